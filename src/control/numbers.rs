//! Numbers for ports and networks, given out lowest first so that the tables stay short.
//!
//! A number is given back only when no shard can still mean its old owner by it, nor a thread of one that was held up in somebody's
//! memory when the owner ended; the controller sees to that.

/// Which of the numbers below a bound are given out.
#[derive(Debug)]
pub(super) struct Numbers {
    taken: Vec<bool>,
    bound: usize,
}

impl Numbers {
    /// None given out yet, all of them below `bound`.
    pub(super) fn below(bound: usize) -> Self {
        Self { taken: Vec::new(), bound }
    }

    /// The lowest number that is free; `None` if all are given out.
    pub(super) fn take(&mut self) -> Option<u16> {
        let number = self.taken.iter().position(|taken| !taken).unwrap_or(self.taken.len());
        if number >= self.bound {
            return None;
        }
        if number == self.taken.len() {
            self.taken.push(false);
        }
        self.taken[number] = true;
        u16::try_from(number).ok()
    }

    /// Takes a number back.
    pub(super) fn give_back(&mut self, number: u16) {
        if let Some(taken) = self.taken.get_mut(usize::from(number)) {
            *taken = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_number_comes_next() {
        let mut numbers = Numbers::below(3);
        assert_eq!([numbers.take(), numbers.take(), numbers.take(), numbers.take()], [Some(0), Some(1), Some(2), None]);
        numbers.give_back(1);
        numbers.give_back(9);
        assert_eq!([numbers.take(), numbers.take()], [Some(1), None]);
    }
}
