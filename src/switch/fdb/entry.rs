//! The two words of an FDB entry: [`Key`], which station, and [`Value`], where it is and what is known of it.
//!
//! Both fit an atomic word, so an entry needs no lock. A value is never the number zero: zero marks a slot whose key is
//! just being put in or taken out. Flap damping is decided here, on values alone.

use std::time::Duration;

use crate::clock::Tick;
use crate::ident::{MacAddr, NetworkIndex, PortIndex};

/// Moves in quick succession that are followed; the next one is damped. RFC 7432, 15.1 declares a MAC address duplicate
/// after 5 moves; no migration, failover of a guest's bond or VRRP election moves an address as often.
pub const FLAP_MOVES: u8 = 5;

/// Moves that are no further apart than this are in quick succession. A loop moves addresses within microseconds, and
/// again with each frame of the real station, which is seldom silent for 10 s; live migrations are further apart.
pub const FLAP_WINDOW: Duration = Duration::from_secs(10);

/// A damped station stays where it is until nothing has tried to move it for this long. Longer than the pauses of TCP's
/// retransmission and ARP's retries, so that a loop that still exists does not start the flapping again.
pub const FLAP_HOLD_DOWN: Duration = Duration::from_secs(30);

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

/// Where a station is: from the lowest bit 16 bits port, 32 bits tick when it was last seen, 11 bits of the tick when
/// it last moved or tried to, 3 bits number of moves in quick succession, then "pinned" and "valid".
///
/// 11 bits of a tick go round in 205 s, far more than the hold-down time; the sweep clears the moves of a station that
/// has been quiet for that, so that an old move is not taken for a recent one when they have gone round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Value(u64);

/// What a sighting of a station at another port than its own leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Move {
    /// It is there now.
    Follow(Value),
    /// It has moved too often and stays; the value notes the attempt.
    Damp(Value),
}

impl Value {
    const SEEN_SHIFT: u32 = 16;
    const TRIED_SHIFT: u32 = 48;
    const TRIED_MASK: u32 = 0x7ff;
    const MOVES_SHIFT: u32 = 59;
    const PINNED: u64 = 1 << 62;
    const VALID: u64 = 1 << 63;

    /// How many moves the count can say: one more than are followed marks a damped station.
    const DAMPED: u8 = FLAP_MOVES + 1;

    #[inline]
    fn pack(port: PortIndex, seen: Tick) -> Self {
        Self(Self::VALID | u64::from(seen.0) << Self::SEEN_SHIFT | u64::from(port.0))
    }

    /// A station that was just seen for the first time.
    #[inline]
    pub(super) fn learned(port: PortIndex, now: Tick) -> Self {
        Self::pack(port, now)
    }

    /// A station that its port's configuration names.
    pub(super) fn pinned(port: PortIndex) -> Self {
        Self(Self::pack(port, Tick(0)).0 | Self::PINNED)
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
        PortIndex(self.0 as u16)
    }

    #[inline]
    pub(super) fn seen(self) -> Tick {
        Tick((self.0 >> Self::SEEN_SHIFT) as u32)
    }

    #[inline]
    pub(super) fn is_pinned(self) -> bool {
        self.0 & Self::PINNED != 0
    }

    pub(super) fn moves(self) -> u8 {
        (self.0 >> Self::MOVES_SHIFT) as u8 & 0x7
    }

    /// The same, seen at its port again.
    #[inline]
    pub(super) fn seen_at(self, now: Tick) -> Self {
        Self(self.0 & !(0xffff_ffff << Self::SEEN_SHIFT) | u64::from(now.0) << Self::SEEN_SHIFT)
    }

    /// How long ago the station was last seen. Shards read the clock at different moments, so an entry may be seen
    /// "later" than `now`: that is no time at all, not 13 years.
    pub(super) fn age(self, now: Tick) -> Duration {
        let late = (now.0.wrapping_sub(self.seen().0) as i32) < 0;
        if late { Duration::ZERO } else { now.since(self.seen()) }
    }

    /// The station was seen at `port`, which is not its own.
    pub(super) fn moved(self, port: PortIndex, now: Tick) -> Move {
        let quiet = self.quiet(now);
        let (moves, follow) = match self.moves() {
            // An earlier burst of moves is over; this is the first of a new one.
            Self::DAMPED if quiet >= FLAP_HOLD_DOWN => (1, true),
            0..=FLAP_MOVES if quiet >= FLAP_WINDOW => (1, true),
            moves @ 0..FLAP_MOVES => (moves + 1, true),
            _ => (Self::DAMPED, false),
        };
        if follow { Move::Follow(Self::pack(port, now).tried(moves, now)) } else { Move::Damp(self.tried(moves, now)) }
    }

    /// The same without its moves, if it had any and has been quiet for the hold-down time.
    pub(super) fn decayed(self, now: Tick) -> Option<Self> {
        (self.moves() > 0 && self.quiet(now) >= FLAP_HOLD_DOWN).then(|| self.tried(0, Tick(0)))
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

const _: () = assert!(Value::DAMPED <= 7, "the number of moves has 3 bits");

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u32 = 10;

    #[test]
    fn fields_do_not_touch_each_other() {
        let value = Value::learned(PortIndex(0xffff), Tick(0)).tried(7, Tick(0));
        assert_eq!((value.port(), value.seen(), value.moves()), (PortIndex(0xffff), Tick(0), 7));
        let value = value.seen_at(Tick(u32::MAX));
        assert_eq!(
            (value.port(), value.seen(), value.moves(), value.is_pinned()),
            (PortIndex(0xffff), Tick(u32::MAX), 7, false)
        );
        let value = Value::pinned(PortIndex(0)).tried(0, Tick(u32::MAX));
        assert_eq!((value.port(), value.seen(), value.moves(), value.is_pinned()), (PortIndex(0), Tick(0), 0, true));
        let key = Key::new(NetworkIndex(0xfedc), MacAddr([0xfe, 1, 2, 3, 4, 5]));
        assert_eq!((key.network(), key.mac()), (NetworkIndex(0xfedc), MacAddr([0xfe, 1, 2, 3, 4, 5])));
    }

    /// The value after the move attempt, and whether it was followed.
    fn step(value: Value, port: u16, now: u32) -> (Value, bool) {
        match value.moved(PortIndex(port), Tick(now)) {
            Move::Follow(value) => (value, true),
            Move::Damp(value) => (value, false),
        }
    }

    #[test]
    fn a_flapping_station_stays_until_it_was_quiet_for_the_hold_down() {
        // The start is past the point where the 11 bits have gone round.
        let mut now = 5000;
        let mut value = Value::learned(PortIndex(0), Tick(now));
        for n in 1..=FLAP_MOVES {
            now += SECOND;
            let followed;
            (value, followed) = step(value, u16::from(n), now);
            assert!(followed && value.moves() == n && value.port() == PortIndex(u16::from(n)));
        }
        let stays = value.port();
        for _ in 0..20 {
            let followed;
            (value, followed) = step(value, 9, now);
            assert!(!followed && value.port() == stays, "each attempt starts the hold-down again");
            now += 29 * SECOND;
        }
        now -= 29 * SECOND;
        now += 30 * SECOND;
        let (value, followed) = step(value, 9, now);
        assert!(followed && value.port() == PortIndex(9) && value.moves() == 1);
    }

    #[test]
    fn moves_far_apart_are_always_followed() {
        let mut value = Value::learned(PortIndex(0), Tick(0));
        for n in 1..50u16 {
            let followed;
            (value, followed) = step(value, n, u32::from(n) * 11 * SECOND);
            assert!(followed && value.moves() == 1);
        }
    }

    #[test]
    fn moves_decay_once_the_hold_down_is_over() {
        let (value, _) = step(Value::learned(PortIndex(0), Tick(0)), 1, 100);
        assert_eq!(value.decayed(Tick(100 + 30 * SECOND - 1)), None);
        let decayed = value.decayed(Tick(100 + 30 * SECOND));
        assert!(decayed.is_some_and(|v| v.moves() == 0 && v.port() == PortIndex(1) && v.seen() == Tick(100)));
        assert_eq!(Value::learned(PortIndex(0), Tick(0)).decayed(Tick(9000)), None);
    }

    #[test]
    fn a_sighting_from_the_future_has_no_age() {
        let value = Value::learned(PortIndex(0), Tick(10));
        assert_eq!(value.age(Tick(9)), Duration::ZERO);
        assert_eq!(value.age(Tick(25)), Duration::from_millis(1500));
        assert_eq!(Value::learned(PortIndex(0), Tick(u32::MAX)).age(Tick(0)), Duration::from_millis(100));
    }
}
