//! The two words of an FDB entry: [`Key`], which station, and [`Value`], where it is and what is known of it.
//!
//! Both fit an atomic word, so an entry needs no lock. A value is never the number zero: zero marks a slot whose key is
//! just being put in or taken out. Flap damping is decided here, on values alone.
//!
//! # Which port has a station that is seen at several
//!
//! A move is followed at once: after a live migration the first frame must do. But a loop moves addresses within
//! microseconds, and a guest may borrow another's. So a station that moved [`FLAP_MOVES`] times, each move within
//! [`FLAP_WINDOW`] of the one before, is *damped* with the next one, and goes back to its *home*: the port at which it was
//! before the first of these moves. Frames with its address from other ports are dropped from then on
//! (`switch::forward`), which ends what goes round in a loop; but for what the looping guest sends itself, where `storm` is
//! the bound. While it is damped,
//!
//! - it is followed to its home at once. Whoever was there first and still talks has his address back with his next frame,
//!   whatever others send, and in a loop that is the real station: copies come in after the frame that they are of.
//! - it is followed elsewhere when the port at which it is has not seen it for `FLAP_WINDOW`. Who borrowed an address and
//!   fell silent, or was unplugged, does not keep it, and what others tried meanwhile does not matter: it is the silence
//!   of the holder that counts. In a loop nothing comes in so late.
//! - otherwise it stays.
//!
//! It is damped until nothing but its own port has seen it for [`FLAP_HOLD_DOWN`]. So long any station that has moved is
//! remembered to belong to its home: whoever took the address of one that was silent does not have it for a home when that
//! one talks again. What this cannot tell apart is a guest that takes an address whose owner is silent for longer than that, and a
//! station that has moved: only `mac:` in the owner's port can.
//!
//! A port that is down holds nothing: its stations are marked *vacant*, stay where they are so that frames to them are not
//! flooded, and are followed anywhere at once. But the port stays their home for `FLAP_HOLD_DOWN`, as if that had been a
//! move in quick succession to those that follow: a guest that takes an address while its owner reboots has it until the owner
//! is back, and is damped if it goes on; a router that takes over from one whose link failed may hand over to a third.

use std::time::Duration;

use crate::clock::Tick;
use crate::ident::{MacAddr, NetworkIndex, PortIndex};
use crate::limits::PORTS;

/// Moves in quick succession that are followed; the next one is damped. RFC 7432, 15.1 declares a MAC address duplicate
/// after 5 moves; no migration, failover of a guest's bond or VRRP election moves an address as often.
pub const FLAP_MOVES: u8 = 5;

/// Moves that are no further apart than this are in quick succession, and a port that has not seen a damped station for
/// this long gives it up. A loop moves addresses within microseconds, and again with each frame of the real station, which
/// is seldom silent for 10 s; live migrations are further apart.
pub const FLAP_WINDOW: Duration = Duration::from_secs(10);

/// A damped station is so until nothing has tried to move it for this long. Longer than a station in use is silent: TCP's
/// longest pause between retransmissions (RFC 6298, 2.5: at least 60 s) and ARP's timeout, or whoever took its address in such
/// a pause would be the one who was there first.
pub const FLAP_HOLD_DOWN: Duration = Duration::from_secs(120);

const MAC_MASK: u64 = (1 << 48) - 1;

/// A station of one network as a number: network in the high 16 bits, MAC address in the low 48. Zero is no station's,
/// because a station's address is never all zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::switch) struct Key(pub(super) u64);

impl Key {
    #[inline]
    pub(super) fn new(network: NetworkIndex, mac: MacAddr) -> Self {
        Self::of_bits(network, mac.to_bits())
    }

    /// The key of the address in the low 48 bits of `mac`.
    #[inline]
    fn of_bits(network: NetworkIndex, mac: u64) -> Self {
        Self(u64::from(network.0) << 48 | mac)
    }

    /// The keys of a frame's destination and source, from the frame's first twelve bytes. Two overlapping 8-byte loads
    /// have them; building them byte by byte takes longer than looking them up.
    #[inline]
    pub(in crate::switch) fn pair(network: NetworkIndex, addresses: &[u8; 12]) -> (Self, Self) {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = *addresses;
        let destination = u64::from_be_bytes([a, b, c, d, e, f, g, h]) >> 16;
        let source = u64::from_be_bytes([e, f, g, h, i, j, k, l]) & MAC_MASK;
        (Self::of_bits(network, destination), Self::of_bits(network, source))
    }

    /// Whether the address is a group's: the lowest bit of its first byte.
    #[inline]
    pub(in crate::switch) fn is_group(self) -> bool {
        self.0 & 1 << 40 != 0
    }

    /// Whether the address is one that a station may have: no group's and not all zero.
    #[inline]
    pub(in crate::switch) fn is_station(self) -> bool {
        !self.is_group() && self.0 & MAC_MASK != 0
    }

    /// Whether bridges keep frames to the address to the link: 01-80-C2-00-00-00 to 0F (IEEE 802.1Q, table 8-1).
    #[inline]
    pub(in crate::switch) fn is_link_local(self) -> bool {
        self.0 & (MAC_MASK & !0xf) == 0x0180_c200_0000
    }

    pub(super) fn network(self) -> NetworkIndex {
        NetworkIndex((self.0 >> 48) as u16)
    }

    pub(super) fn mac(self) -> MacAddr {
        MacAddr::from_bits(self.0)
    }
}

/// Where a station is: from the lowest bit 12 bits port, 12 bits home, 24 bits tick when it was last seen at its port,
/// 11 bits of the tick when it last moved or another port saw it, 3 bits number of moves in quick succession, then "pinned"
/// and "valid".
///
/// 24 bits of a tick go round in 19 days, 11 bits in 205 s; the longest MAC age is 12 days. The sweep takes out or settles
/// an entry in between, so that an old tick is not taken for a recent one when they have gone round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Value(u64);

/// What a sighting of a station at another port than its own leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Move {
    /// It is there now.
    Follow(Value),
    /// It has moved too often: it is at its home now, which is neither.
    Return(Value),
    /// It has moved too often and stays; the value notes the attempt.
    Stay(Value),
}

impl Value {
    const PORT_MASK: u64 = 0xfff;
    const HOME_SHIFT: u32 = 12;
    const SEEN_SHIFT: u32 = 24;
    const SEEN_MASK: u32 = 0xff_ffff;
    const TRIED_SHIFT: u32 = 48;
    const TRIED_MASK: u32 = 0x7ff;
    const MOVES_SHIFT: u32 = 59;
    const MOVES_MASK: u8 = 0x7;
    const PINNED: u64 = 1 << 62;
    const VALID: u64 = 1 << 63;

    /// In place of a number of moves: one more than are followed.
    const DAMPED: u8 = FLAP_MOVES + 1;
    /// In place of a number of moves: the station's port was down.
    const VACANT: u8 = FLAP_MOVES + 2;

    /// Shards read the clock at different moments: an entry that was seen so many ticks "later" is meant, not one of 19 days.
    const LATE: u32 = 0xffff;

    #[inline]
    fn pack(port: PortIndex, home: PortIndex, seen: Tick) -> Self {
        let seen = u64::from(seen.0 & Self::SEEN_MASK) << Self::SEEN_SHIFT;
        let home = (u64::from(home.0) & Self::PORT_MASK) << Self::HOME_SHIFT;
        Self(Self::VALID | seen | home | u64::from(port.0) & Self::PORT_MASK)
    }

    /// A station that was just seen for the first time.
    #[inline]
    pub(super) fn learned(port: PortIndex, now: Tick) -> Self {
        Self::pack(port, port, now)
    }

    /// A station that its port's configuration names.
    pub(super) fn pinned(port: PortIndex) -> Self {
        Self(Self::pack(port, port, Tick(0)).0 | Self::PINNED)
    }

    /// The value that a slot's word holds, unless the slot is in transition.
    #[inline]
    pub(super) fn from_word(word: u64) -> Option<Self> {
        (word != 0).then_some(Self(word))
    }

    #[inline]
    pub(super) fn word(self) -> u64 {
        self.0
    }

    #[inline]
    pub(super) fn port(self) -> PortIndex {
        PortIndex((self.0 & Self::PORT_MASK) as u16)
    }

    /// Whether it is where it was not before it began to move.
    pub(super) fn is_away(self) -> bool {
        self.home() != self.port()
    }

    /// Where it was before it began to move.
    pub(super) fn home(self) -> PortIndex {
        PortIndex((self.0 >> Self::HOME_SHIFT & Self::PORT_MASK) as u16)
    }

    /// Whether it was last seen at its port in this tick.
    #[inline]
    pub(super) fn is_fresh(self, now: Tick) -> bool {
        (self.0 >> Self::SEEN_SHIFT) as u32 & Self::SEEN_MASK == now.0 & Self::SEEN_MASK
    }

    #[inline]
    pub(super) fn is_pinned(self) -> bool {
        self.0 & Self::PINNED != 0
    }

    /// How often it moved in quick succession, or tried to.
    pub(super) fn moves(self) -> u8 {
        if self.is_vacant() { 0 } else { self.count() }
    }

    /// Whether it has moved too often.
    pub(super) fn is_damped(self) -> bool {
        self.count() == Self::DAMPED
    }

    /// Whether its port was down and has not seen it since.
    pub(super) fn is_vacant(self) -> bool {
        self.count() == Self::VACANT
    }

    fn count(self) -> u8 {
        (self.0 >> Self::MOVES_SHIFT) as u8 & Self::MOVES_MASK
    }

    /// The same, seen at its port again.
    #[inline]
    pub(super) fn seen_at(self, now: Tick) -> Self {
        if self.is_vacant() {
            return Self::learned(self.port(), now);
        }
        let seen = u64::from(now.0 & Self::SEEN_MASK) << Self::SEEN_SHIFT;
        Self(self.0 & !(u64::from(Self::SEEN_MASK) << Self::SEEN_SHIFT) | seen)
    }

    /// How long ago the station was last seen at its port.
    pub(super) fn age(self, now: Tick) -> Duration {
        let seen = (self.0 >> Self::SEEN_SHIFT) as u32;
        let ticks = now.0.wrapping_sub(seen) & Self::SEEN_MASK;
        let late = ticks >= Self::SEEN_MASK - Self::LATE;
        Tick(if late { 0 } else { ticks }).since(Tick(0))
    }

    /// The station was seen at `port`, which is not its own.
    pub(super) fn moved(self, port: PortIndex, now: Tick) -> Move {
        let quiet = self.quiet(now);
        match self.count() {
            Self::DAMPED if quiet < FLAP_HOLD_DOWN => self.contested(port, now),
            FLAP_MOVES if quiet < FLAP_WINDOW => self.damped(port, now),
            moves @ 1..FLAP_MOVES if quiet < FLAP_WINDOW => {
                Move::Follow(Self::pack(port, self.home(), now).tried(moves + 1, now))
            }
            Self::VACANT => Move::Follow(Self::pack(port, self.port(), now).tried(0, now)),
            // An earlier burst of moves is over, and this is the first of a new one. But who was there before it may still come back.
            0..=FLAP_MOVES if self.is_away() && quiet < FLAP_HOLD_DOWN => {
                Move::Follow(Self::pack(port, self.home(), now).tried(1, now))
            }
            _ => Move::Follow(Self::pack(port, self.port(), now).tried(1, now)),
        }
    }

    /// It is seen at `port`, and that is one move too many. At its home it counts as just seen: that gives its station the time
    /// to say something.
    fn damped(self, port: PortIndex, now: Tick) -> Move {
        let home = self.home();
        if self.port() == home {
            return Move::Stay(self.tried(Self::DAMPED, now));
        }
        let back = Self::pack(home, home, now).tried(Self::DAMPED, now);
        if port == home { Move::Follow(back) } else { Move::Return(back) }
    }

    /// It is damped, and is seen at `port`.
    fn contested(self, port: PortIndex, now: Tick) -> Move {
        if port == self.home() || self.age(now) >= FLAP_WINDOW {
            Move::Follow(Self::pack(port, self.home(), now).tried(Self::DAMPED, now))
        } else {
            Move::Stay(self.tried(Self::DAMPED, now))
        }
    }

    /// The same without its moves and its home, if it had any and has been quiet for the hold-down time.
    pub(super) fn decayed(self, now: Tick) -> Option<Self> {
        ((self.moves() > 0 || self.is_away()) && self.quiet(now) >= FLAP_HOLD_DOWN).then(|| self.settled())
    }

    /// The same as if it had never moved.
    pub(super) fn settled(self) -> Self {
        let home = u64::from(self.port().0) << Self::HOME_SHIFT;
        Self(self.0 & !(Self::PORT_MASK << Self::HOME_SHIFT) | home).tried(0, Tick(0))
    }

    /// The same, when its port is down.
    pub(super) fn vacated(self) -> Self {
        self.settled().tried(Self::VACANT, Tick(0))
    }

    /// How long ago the station last moved or tried to, as far as 11 bits can tell.
    fn quiet(self, now: Tick) -> Duration {
        let tried = (self.0 >> Self::TRIED_SHIFT) as u32 & Self::TRIED_MASK;
        let ticks = (now.0 & Self::TRIED_MASK).wrapping_sub(tried) & Self::TRIED_MASK;
        Tick(ticks).since(Tick(0))
    }

    fn tried(self, moves: u8, now: Tick) -> Self {
        let kept = self.0 & !(0x3fff << Self::TRIED_SHIFT);
        let tried = u64::from(now.0 & Self::TRIED_MASK) << Self::TRIED_SHIFT;
        Self(kept | u64::from(moves) << Self::MOVES_SHIFT | tried)
    }
}

const _: () = assert!(Value::VACANT <= Value::MOVES_MASK, "the number of moves has 3 bits");
const _: () = assert!(PORTS <= Value::PORT_MASK as usize + 1, "a port has 12 bits");

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u32 = 10;

    #[test]
    fn fields_do_not_touch_each_other() {
        let fields = |v: Value| (v.port(), v.home(), v.age(Tick(0)), v.moves(), v.is_pinned());
        let value = Value::pack(PortIndex(0xfff), PortIndex(0), Tick(0)).tried(6, Tick(0));
        assert_eq!(fields(value), (PortIndex(0xfff), PortIndex(0), Duration::ZERO, 6, false));
        let value = Value::pack(PortIndex(0), PortIndex(0xfff), Tick(1 << 20)).tried(0, Tick(u32::MAX));
        let age = Tick((1 << 24) - (1 << 20)).since(Tick(0));
        assert_eq!(fields(value), (PortIndex(0), PortIndex(0xfff), age, 0, false));
        let value = Value::pinned(PortIndex(0)).seen_at(Tick(u32::MAX - 5)).tried(0, Tick(u32::MAX));
        assert_eq!(fields(value), (PortIndex(0), PortIndex(0), Duration::from_millis(600), 0, true));
        let key = Key::new(NetworkIndex(0xfedc), MacAddr([0xfe, 1, 2, 3, 4, 5]));
        assert_eq!((key.network(), key.mac()), (NetworkIndex(0xfedc), MacAddr([0xfe, 1, 2, 3, 4, 5])));
    }

    /// A station that is seen at one port after the other.
    struct Station(Value);

    impl Station {
        /// At port 0, with the moves that are followed made to and fro between it and port 1, ten a second. The next one is
        /// damped. Past the point where the 11 bits of the tick have gone round.
        fn restless() -> (Self, u32) {
            let mut station = Self(Value::learned(PortIndex(0), Tick(5000)));
            for n in 1..=u32::from(FLAP_MOVES) {
                assert!(station.at((n % 2) as u16, 5000 + n), "move {n}");
                assert_eq!((u32::from(station.0.moves()), station.0.home()), (n, PortIndex(0)));
            }
            (station, 5000 + u32::from(FLAP_MOVES))
        }

        /// Whether a sighting at `port` leaves it there.
        fn at(&mut self, port: u16, now: u32) -> bool {
            self.0 = match self.0 {
                value if value.port().0 == port => value.seen_at(Tick(now)),
                value => match value.moved(PortIndex(port), Tick(now)) {
                    Move::Follow(value) | Move::Return(value) | Move::Stay(value) => value,
                },
            };
            self.0.port().0 == port
        }
    }

    /// The guest at port 1 borrows the address of the one at port 0.
    #[test]
    fn whoever_was_there_first_has_the_address_as_long_as_he_talks() {
        let (mut station, now) = Station::restless();
        assert_eq!(station.0.port(), PortIndex(1));
        assert!(!station.at(2, now + 1) && station.0.port() == PortIndex(0), "it goes home, whoever tries");
        for n in 0..100 * SECOND {
            assert!(!station.at(1, now + 2 + n) && station.0.is_damped());
            assert!(n % (9 * SECOND) != 0 || station.at(0, now + 2 + n));
        }
    }

    #[test]
    fn who_takes_the_address_of_a_silent_station_gives_it_back_at_its_first_frame() {
        let (mut station, now) = Station::restless();
        assert!(station.at(0, now + 1) && station.0.is_damped());
        let silent = now + 1 + 10 * SECOND;
        assert!(!station.at(1, silent - 1) && station.at(1, silent));
        for n in 0..119 * SECOND {
            assert!(station.at(1, silent + n));
        }
        assert!(station.at(0, silent + 119 * SECOND), "after 119 s of the borrower alone");
        assert!(!station.at(1, silent + 119 * SECOND) && !station.at(2, silent + 119 * SECOND));
    }

    #[test]
    fn a_silent_holder_gives_the_address_up_however_often_others_tried() {
        let (mut station, now) = Station::restless();
        station.at(2, now + 1);
        // Port 0, its home, never speaks up.
        let tries: Vec<bool> = (0..10 * SECOND).map(|n| station.at(2, now + 2 + n)).collect();
        assert_eq!(tries.iter().position(|followed| *followed), Some(10 * SECOND as usize - 1));
        assert!(!station.at(3, now + 12 * SECOND), "who has it and talks keeps it, though it is not his home");
        assert!(station.at(0, now + 12 * SECOND), "but the home is free to have it back");
    }

    #[test]
    fn damping_ends_when_nobody_tried_for_the_hold_down() {
        let (mut station, now) = Station::restless();
        station.at(2, now);
        let (before, after) = (now + 120 * SECOND - 1, now + 120 * SECOND);
        for port in [0, 2] {
            assert!(station.at(0, before - 1), "it is seen at its port all the time");
            let mut late = Station(station.0);
            assert!(!late.at(3, before) && late.0.is_damped());
            let mut later = Station(station.0);
            assert!(later.at(3, after) && later.0.moves() == 1 && later.0.home() == PortIndex(0), "{port}");
        }
    }

    #[test]
    fn moves_far_apart_are_always_followed() {
        for (apart, home) in [(11, |_| 0), (121, |n| n - 1)] as [(u32, fn(u16) -> u16); 2] {
            let mut station = Station(Value::learned(PortIndex(0), Tick(0)));
            for n in 1..50u16 {
                assert!(station.at(n, u32::from(n) * apart * SECOND));
                assert_eq!((station.0.moves(), station.0.home()), (1, PortIndex(home(n))), "{apart} s apart");
            }
        }
    }

    /// The guest at port 1 has taken the address of the one at port 0 while that was silent, and goes on when it talks again.
    #[test]
    fn who_took_the_address_of_a_silent_station_is_not_its_home() {
        for silence in [1, 11, 60, 119] {
            let mut station = Station(Value::learned(PortIndex(0), Tick(5000)));
            let taken = 5000 + 20 * SECOND;
            assert!(station.at(1, taken));
            let back = taken + silence * SECOND;
            assert!(station.at(1, back - 1) && station.at(0, back), "it is followed back after {silence} s");
            let last = (1..=10).filter(|n| station.at((n % 2) as u16, back + n)).last();
            assert_eq!((station.0.is_damped(), station.0.home(), last), (true, PortIndex(0), Some(10)), "{silence} s");
            assert!(!station.at(1, back + 11) && station.at(0, back + 12));
        }
    }

    #[test]
    fn a_port_that_is_down_holds_nothing() {
        let (station, now) = Station::restless();
        let vacant = station.0.vacated();
        assert!(vacant.is_vacant() && vacant.moves() == 0 && vacant.port() == PortIndex(1));
        let mut taken = Station(vacant);
        assert!(taken.at(7, now) && taken.0.moves() == 0 && taken.0.home() == PortIndex(1));
        let back = now + 119 * SECOND;
        assert!(taken.at(7, back) && taken.at(1, back), "it is up again");
        let tries: Vec<_> = (1..=6).map(|n| taken.at(if n % 2 == 1 { 7 } else { 1 }, back + n)).collect();
        assert_eq!(
            tries,
            [true, true, true, true, false, true],
            "five moves are followed, and the next one leads home"
        );
        assert!(!taken.at(7, back + 7) && taken.0.is_damped() && taken.0.home() == PortIndex(1));
        let late = Station(vacant).0.moved(PortIndex(7), Tick(now));
        let Move::Follow(late) = late else { panic!("{late:?}") };
        assert_eq!(late.decayed(Tick(now + 120 * SECOND - 1)), None);
        assert_eq!(late.decayed(Tick(now + 120 * SECOND)), Some(Value::learned(PortIndex(7), Tick(now))));
        assert_eq!(vacant.seen_at(Tick(now)), Value::learned(PortIndex(1), Tick(now)), "it is up again");
        assert_eq!(vacant.decayed(Tick(now + 9000)), None);
    }

    /// The link of the first of three routers fails; the second one, which took over, hands over to the third.
    #[test]
    fn an_address_that_left_a_port_that_is_down_may_move_on() {
        for pause in [1, 5 * SECOND, 30 * SECOND, 119 * SECOND, 121 * SECOND] {
            let mut router = Station(Value::learned(PortIndex(1), Tick(5000)).vacated());
            assert!(router.at(2, 5000 + SECOND));
            assert!(router.at(3, 5000 + SECOND + pause) && !router.0.is_damped(), "{pause}");
            // The first one is back and takes over again.
            assert!(router.at(1, 5000 + 2 * SECOND + pause) && !router.0.is_damped(), "{pause}");
        }
    }

    #[test]
    fn moves_decay_once_the_hold_down_is_over() {
        let (station, now) = Station::restless();
        assert_eq!(station.0.decayed(Tick(now + 120 * SECOND - 1)), None);
        let decayed = station.0.decayed(Tick(now + 120 * SECOND));
        assert_eq!(decayed, Some(Value::learned(PortIndex(1), Tick(now))));
        assert_eq!(Value::learned(PortIndex(0), Tick(0)).decayed(Tick(9000)), None);
    }

    #[test]
    fn a_sighting_from_the_future_has_no_age() {
        let value = Value::learned(PortIndex(0), Tick(10));
        assert_eq!(value.age(Tick(9)), Duration::ZERO);
        assert_eq!(value.age(Tick(25)), Duration::from_millis(1500));
        assert_eq!(Value::learned(PortIndex(0), Tick(u32::MAX)).age(Tick(0)), Duration::from_millis(100));
        // The longest MAC age that can be configured, and as long as a sweep may be late.
        assert_eq!(value.age(Tick(10_000_600)), Duration::from_secs(1_000_059));
    }
}
