//! Frames that wait for the host: [`Backlog`], between the shards and the thread that gives them to it ([`super::writer`]).
//!
//! Each sender has a list of its own, so that none keeps the frames of another from being written, and all take pieces of memory from
//! one heap. A sender may have three times what it leaves free (the dynamic thresholds of Choudhury and Hahne, 1998): three quarters if
//! it is alone, and where `n` take all they can, 3 / (3n + 1) each once those that came first have given back what is more than that. An
//! eighth of the heap is left out of that, for senders that have less than a few pieces. Nobody is granted any who has as many
//! records waiting as a ring has ([`MOST_RECORDS`]): what sends small frames without end would have most of the heap else, and large ones of
//! others no room. A sender that is `shut` has none.
//!
//! A shard is granted pieces ([`Backlog::grant`]), copies frames into them without a lock, for it may be held up in a sender's memory
//! there, and hands them over ([`Backlog::admit`]). The writer takes a sender's list whole ([`Backlog::take`]) and gives the pieces
//! back ([`Backlog::settle`]). Pieces and records are moved from one list to another and never made by a shard. The one that was given
//! back last is used first, so it is still in a cache. The writer makes more when less than three quarters of them are
//! free, up to [`TAP_PIECES`].
//!
//! Invariant: a sender's `held` is the number of its pieces that are not on the heap, whoever has them.

use std::collections::VecDeque;
use std::sync::MutexGuard;

use super::piece::{Piece, Pieces, RECORD_PIECES, Spans};
use crate::ident::PortIndex;
use crate::limits::{PORTS, TAP_PIECE_BYTES, TAP_PIECES, TAP_PIECES_AT_FIRST};
use crate::port::batch_lock::BatchLock;

/// A sender may have this many times what it leaves free.
const SHARE: usize = 3;

/// What is not shared so is one in so many parts of the heap, for senders that have less than [`FEW`].
const RESERVE: usize = 8;
const FEW: usize = RECORD_PIECES;

/// Who has so many records waiting is granted no pieces.
const MOST_RECORDS: usize = 512;

/// Frames that wait, of any shard.
pub(super) struct Backlog(BatchLock<Waiting>);

struct Waiting {
    heap: Pieces,
    /// How many pieces there are, wherever they are.
    made: usize,
    senders: Box<[Sender]>,
    /// Senders that have frames again since the writer has last asked, each once.
    fresh: Vec<PortIndex>,
}

#[derive(Default)]
struct Sender {
    /// The last one first.
    records: Pieces,
    held: usize,
    /// Records of it that are not spent, whoever has them.
    waiting: usize,
    /// The writer knows, or will be told, that it has frames.
    listed: bool,
    /// Nothing more is taken of it.
    shut: bool,
}

/// Why a sender is granted nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Denied {
    /// Somebody else is at it for too long.
    Occupied,
    /// Its frames take the host too long.
    Shut,
}

/// Pieces that a sender was granted, and the records that were made of them.
pub(super) struct Grant<'b> {
    backlog: &'b Backlog,
    sender: PortIndex,
    pieces: Pieces,
    /// The last one first.
    records: Pieces,
}

/// What the writer has done with for a sender.
pub(super) struct Spent {
    pub(super) sender: PortIndex,
    pub(super) records: usize,
    pub(super) pieces: Pieces,
}

impl Backlog {
    pub(super) fn new() -> Self {
        let senders = (0..PORTS).map(|_| Sender::default()).collect();
        let mut waiting = Waiting { heap: Pieces::default(), made: 0, senders, fresh: Vec::with_capacity(PORTS) };
        waiting.add(Pieces::made(TAP_PIECES_AT_FIRST));
        Self(BatchLock::new(waiting))
    }

    /// Pieces for records of these lengths, of `sender`, or as many as it may have.
    ///
    /// # Errors
    /// Nothing is taken of it now.
    #[inline]
    pub(super) fn grant(&self, sender: PortIndex, lens: impl Iterator<Item = usize>) -> Result<Grant<'_>, Denied> {
        let want = lens.map(pieces_for).sum();
        let pieces = self.enter()?.grant(sender, want)?;
        Ok(Grant { backlog: self, sender, pieces, records: Pieces::default() })
    }

    /// Hands over what was made of a grant, and gives the rest back; returns whether there is something for the writer.
    #[inline]
    pub(super) fn admit(&self, grant: Grant<'_>) -> bool {
        let Grant { sender, pieces, records, .. } = grant;
        let records = records.reversed();
        self.0.lock().admit(sender, pieces, records)
    }

    /// Gives back what was spent, tells which senders have frames again, and has more pieces made if few are left.
    pub(super) fn settle(&self, spent: Option<Spent>, round: &mut VecDeque<PortIndex>) {
        let mut waiting = self.0.lock();
        if let Some(Spent { sender, records, pieces }) = spent {
            waiting.give_back(sender, pieces);
            if let Some(sender) = waiting.senders.get_mut(sender.index()) {
                sender.waiting = sender.waiting.saturating_sub(records);
            }
        }
        round.extend(waiting.fresh.drain(..));
        let more = waiting.made.min(TAP_PIECES - waiting.made);
        if more > 0 && waiting.heap.len() < waiting.made * 3 / 4 {
            drop(waiting);
            let made = Pieces::made(more);
            self.0.lock().add(made);
        }
    }

    /// Everything that waits of `sender`, the first one first.
    pub(super) fn take(&self, sender: PortIndex) -> Pieces {
        let mut waiting = self.0.lock();
        let Some(sender) = waiting.senders.get_mut(sender.index()) else { return Pieces::default() };
        let records = std::mem::take(&mut sender.records);
        sender.listed = !records.is_empty();
        drop(waiting);
        records.reversed()
    }

    /// Has nothing more taken of `sender`, or something again.
    pub(super) fn shut(&self, sender: PortIndex, shut: bool) {
        if let Some(sender) = self.0.lock().senders.get_mut(sender.index()) {
            sender.shut = shut;
        }
    }

    fn enter(&self) -> Result<MutexGuard<'_, Waiting>, Denied> {
        self.0.enter(0).ok_or(Denied::Occupied)
    }
}

impl Waiting {
    fn add(&mut self, pieces: Pieces) {
        self.made += pieces.len();
        self.heap.push_all(pieces);
    }

    fn grant(&mut self, sender: PortIndex, want: usize) -> Result<Pieces, Denied> {
        let Some(sender) = self.senders.get_mut(sender.index()) else { return Ok(Pieces::default()) };
        if sender.shut {
            return Err(Denied::Shut);
        }
        let shared = self.heap.len().saturating_sub(self.made / RESERVE);
        let may = ((SHARE * shared).saturating_sub(sender.held) / (SHARE + 1)).max(FEW.saturating_sub(sender.held));
        let may = if sender.waiting < MOST_RECORDS { may } else { 0 };
        let mut pieces = Pieces::default();
        while pieces.len() < want.min(may)
            && let Some(piece) = self.heap.pop()
        {
            pieces.push(piece);
        }
        sender.held += pieces.len();
        Ok(pieces)
    }

    fn admit(&mut self, number: PortIndex, rest: Pieces, records: Pieces) -> bool {
        self.give_back(number, rest);
        let Some(sender) = self.senders.get_mut(number.index()).filter(|_| !records.is_empty()) else { return false };
        sender.waiting += records.len();
        sender.records.push_all(records);
        if !sender.listed {
            sender.listed = true;
            self.fresh.push(number);
        }
        true
    }

    fn give_back(&mut self, sender: PortIndex, pieces: Pieces) {
        if let Some(sender) = self.senders.get_mut(sender.index()) {
            sender.held = sender.held.saturating_sub(pieces.len());
        }
        self.heap.push_all(pieces);
    }
}

impl Grant<'_> {
    /// Makes a record of `len` bytes, which `fill` writes; whether there was room for it.
    #[inline]
    pub(super) fn put(&mut self, len: usize, fill: impl FnOnce(Spans<'_>)) -> bool {
        let Some(mut record) = self.record(len) else { return false };
        fill(record.spans());
        self.records.push(record);
        true
    }

    /// How many records there are.
    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    /// Forgets those behind the first `len`.
    pub(super) fn truncate(&mut self, len: usize) {
        while self.records.len() > len
            && let Some(record) = self.records.pop()
        {
            record.come_apart(&mut self.pieces);
        }
    }

    fn record(&mut self, len: usize) -> Option<Box<Piece>> {
        let count = pieces_for(len);
        if self.pieces.len() < count {
            self.ask_for(count)?;
        }
        let mut record = self.pieces.pop()?;
        for _ in 1..count {
            record.more.push(self.pieces.pop()?);
        }
        record.begin(len);
        Some(record)
    }

    /// Has so many pieces, if the sender may: it was not known before that so many would be needed.
    #[cold]
    fn ask_for(&mut self, count: usize) -> Option<()> {
        let more = self.backlog.enter().ok()?.grant(self.sender, count - self.pieces.len()).ok()?;
        self.pieces.push_all(more);
        (self.pieces.len() >= count).then_some(())
    }
}

/// How many pieces a record of `len` bytes needs.
#[inline]
fn pieces_for(len: usize) -> usize {
    len.div_ceil(TAP_PIECE_BYTES).max(1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::limits::{FRAME_MAX_BYTES, VNET_HEADER_BYTES};
    use crate::mem::Cursor;

    fn put(backlog: &Backlog, sender: u16, len: usize, byte: u8) -> bool {
        let mut grant = backlog.grant(PortIndex(sender), [len].into_iter()).unwrap();
        let there = grant.put(len, |spans| Cursor::new(&spans).write(&vec![byte; len]));
        assert_eq!(backlog.admit(grant), there);
        there
    }

    /// What waits of a sender, as its bytes; it is given back.
    fn taken(backlog: &Backlog, sender: u16) -> Vec<Vec<u8>> {
        let sender = PortIndex(sender);
        let (mut got, mut pieces, mut records) = (Vec::new(), Pieces::default(), backlog.take(sender));
        while let Some(record) = records.pop() {
            got.push(record.slices().iter().flat_map(|slice| slice.to_vec()).collect());
            record.come_apart(&mut pieces);
        }
        backlog.settle(Some(Spent { sender, records: got.len(), pieces }), &mut VecDeque::new());
        got
    }

    #[test]
    fn records_of_any_length_come_out_as_they_went_in_and_each_sender_is_told_once() {
        let (backlog, mut round) = (Backlog::new(), VecDeque::new());
        let lens = [1, 60, 2047, 2048, 2049, 9000, 65_000, VNET_HEADER_BYTES + FRAME_MAX_BYTES];
        for (byte, len) in lens.into_iter().enumerate() {
            assert!(put(&backlog, 7, len, byte as u8) && put(&backlog, 9, 60, byte as u8));
        }
        backlog.settle(None, &mut round);
        assert_eq!(round, [PortIndex(7), PortIndex(9)]);
        let expected: Vec<_> = lens.into_iter().enumerate().map(|(byte, len)| vec![byte as u8; len]).collect();
        assert!(taken(&backlog, 7) == expected);
        // More come while the writer still has it on its list, and after it was found to have none.
        assert!(put(&backlog, 7, 60, 1) && taken(&backlog, 7).len() == 1 && taken(&backlog, 7).is_empty());
        assert!(put(&backlog, 7, 60, 1));
        round.clear();
        backlog.settle(None, &mut round);
        assert_eq!(round, [PortIndex(7)]);
        assert_eq!((taken(&backlog, 7).len(), taken(&backlog, 9).len()), (1, lens.len()));
        assert!(backlog.0.lock().senders.iter().all(|sender| sender.held == 0));
        let waiting = backlog.0.lock();
        assert_eq!(waiting.heap.len(), waiting.made, "all of them are back");
    }

    /// A record that takes so many pieces.
    const LARGE: usize = 16;

    /// One that has all the pieces that it may have.
    fn grown() -> Backlog {
        let backlog = Backlog::new();
        for _ in 0..100 {
            while put(&backlog, 0, LARGE * TAP_PIECE_BYTES, 1) {}
            backlog.settle(None, &mut VecDeque::new());
        }
        assert_eq!(backlog.0.lock().made, TAP_PIECES, "no more than there may be");
        taken(&backlog, 0);
        backlog
    }

    /// How many records of so many pieces a sender may have wait.
    fn count(backlog: &Backlog, sender: u16, pieces: usize) -> usize {
        (0..).take_while(|_| put(backlog, sender, pieces * TAP_PIECE_BYTES, 1)).count()
    }

    #[test]
    fn a_sender_that_takes_all_it_can_leaves_some_to_whoever_comes() {
        let backlog = grown();
        let first = count(&backlog, 0, LARGE);
        assert!((TAP_PIECES * 5 / 8..TAP_PIECES * 3 / 4).contains(&(first * LARGE)), "{first}");
        let hogs: Vec<_> = (1..8).map(|sender| count(&backlog, sender, LARGE)).collect();
        assert!(hogs.is_sorted_by(|a, b| a >= b) && hogs[6] * LARGE >= FEW - LARGE, "{hogs:?}");
        for sender in 8..20 {
            assert_eq!(count(&backlog, sender, FEW), 1, "{sender}");
        }
        // What is given back is shared anew, and the first one has no more than the others.
        assert_eq!(taken(&backlog, 0).len(), first);
        let again = count(&backlog, 40, LARGE);
        assert!(again * LARGE > TAP_PIECES / 4 && count(&backlog, 0, LARGE) < again, "{again}");
    }

    #[test]
    fn small_frames_of_some_leave_room_for_large_ones_of_another() {
        let backlog = grown();
        for sender in 0..8 {
            assert_eq!(count(&backlog, sender, 1), MOST_RECORDS);
        }
        let largest = (VNET_HEADER_BYTES + FRAME_MAX_BYTES).div_ceil(TAP_PIECE_BYTES);
        assert!(count(&backlog, 8, largest) >= 64, "a batch of the largest frames");
        // It may have more when one is written.
        backlog
            .settle(Some(Spent { sender: PortIndex(0), records: 1, pieces: Pieces::default() }), &mut VecDeque::new());
        assert_eq!(count(&backlog, 0, 1), 1);
    }

    #[test]
    fn what_was_put_there_in_vain_is_forgotten() {
        let backlog = Backlog::new();
        let mut grant = backlog.grant(PortIndex(1), [1].into_iter()).unwrap();
        for len in [100, 20_000, 300] {
            assert!(grant.put(len, |_| {}), "it is granted what it turns out to need");
        }
        grant.truncate(1);
        assert!(grant.len() == 1 && backlog.admit(grant));
        assert_eq!(taken(&backlog, 1).iter().map(Vec::len).collect::<Vec<_>>(), [100]);
        assert!(!backlog.admit(backlog.grant(PortIndex(1), [1].into_iter()).unwrap()), "nothing");
        assert_eq!(backlog.0.lock().senders[1].held, 0);
    }

    #[test]
    fn who_is_shut_out_is_granted_nothing_and_others_are() {
        let backlog = Backlog::new();
        backlog.shut(PortIndex(1), true);
        assert_eq!(backlog.grant(PortIndex(1), [60].into_iter()).err(), Some(Denied::Shut));
        assert!(put(&backlog, 2, 60, 1));
        backlog.shut(PortIndex(1), false);
        assert!(put(&backlog, 1, 60, 1));
    }
}
