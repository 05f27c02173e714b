//! How many pieces of memory a front end may have mapped here, and how many files open for that: a [`Budget`] of each, what the kernel
//! lets this process have of them, and [`Account`], what one front end has of it.
//!
//! A process may have `vm.max_map_count` mappings, 65530 unless the host says otherwise, and 129 front ends with 509 regions each
//! would have them all: then no VM starts, no memory is plugged in, and threads find no stacks. It may have as many descriptors as its
//! RLIMIT_NOFILE says, and where that is 1024, two front ends with a file for each region would have them all. So each has [`OWN`]
//! regions and [`OWN_FILES`] files that nobody can take from it, and what it has beyond comes from a pool, a quarter of the kernel's
//! limit. Of that a front end gets no more than is left. However many are greedy, `n` of them leave one part in `n + 1` to whoever comes
//! next. What regions take beyond that while pages of them are missing is bounded in `sys::pieces`: 8192 mappings, an eighth.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock};

use crate::sys::descriptors;

/// Regions that each front end may have whatever others have: QEMU without plugged memory has 2 to 8, and SET_MEM_TABLE can
/// name 32.
const OWN: u32 = 32;

/// Files that each front end may have open here whatever others have: one for each NUMA node of a VM, its firmware and its screen.
/// Regions that lie in one file have it together.
pub(super) const OWN_FILES: u32 = 16;

/// What the kernel lets a process have where that cannot be read (linux/mm.h: DEFAULT_MAX_MAP_COUNT).
const DEFAULT_LIMIT: u32 = 65_530;

/// What all front ends may have together.
#[derive(Debug)]
pub(super) struct Budget {
    /// What the process may have.
    limit: u32,
    /// What each front end may have whatever others have.
    own: u32,
    /// How many of the pool are left.
    left: AtomicU32,
}

/// What one front end has.
#[derive(Debug)]
pub(super) struct Account {
    budget: Arc<Budget>,
    own: AtomicU32,
    pooled: AtomicU32,
}

/// A region that may be mapped, or a file that may be open. Given back when this goes.
#[derive(Debug)]
pub(super) struct Place {
    account: Arc<Account>,
    pooled: bool,
}

/// A front end that has too many, by the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Exhausted {
    /// How many it has.
    pub held: u32,
    /// How many the process may have.
    pub limit: u32,
}

impl Budget {
    /// That of a process that may have so many mappings.
    pub fn of_mappings(limit: u32) -> Self {
        Self { limit, own: OWN, left: AtomicU32::new(limit / 4) }
    }

    /// That of a process that may have so many descriptors.
    pub fn of_files(limit: u32) -> Self {
        Self { limit, own: OWN_FILES, left: AtomicU32::new(limit / 4) }
    }

    /// This process's of files. Its limit is not raised any more when the first front end comes.
    pub fn files_of_process() -> Arc<Self> {
        static BUDGET: LazyLock<Arc<Budget>> =
            LazyLock::new(|| Arc::new(Budget::of_files(descriptors::limit().try_into().unwrap_or(u32::MAX))));
        Arc::clone(&BUDGET)
    }

    /// This process's of mappings.
    pub fn mappings_of_process() -> Arc<Self> {
        static BUDGET: LazyLock<Arc<Budget>> = LazyLock::new(|| {
            let text = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
            // The kernel's is signed and may be larger than any number that matters.
            let limit = text.trim().parse::<u64>().map_or(DEFAULT_LIMIT, |limit| limit.try_into().unwrap_or(u32::MAX));
            Arc::new(Budget::of_mappings(limit))
        });
        Arc::clone(&BUDGET)
    }
}

impl Account {
    /// One that has nothing.
    pub fn new(budget: Arc<Budget>) -> Arc<Self> {
        Arc::new(Self { budget, own: AtomicU32::new(0), pooled: AtomicU32::new(0) })
    }

    /// Room for one more. For the one thread that serves the front end.
    pub fn take(self: &Arc<Self>) -> Result<Place, Exhausted> {
        let Self { budget, own, pooled } = &**self;
        let order = Ordering::Relaxed;
        let place = |pooled| Place { account: Arc::clone(self), pooled };
        if own.fetch_update(order, order, |own| (own < budget.own).then_some(own + 1)).is_ok() {
            return Ok(place(false));
        }
        let had = pooled.load(order);
        if budget.left.fetch_update(order, order, |left| if had < left { left.checked_sub(1) } else { None }).is_err() {
            return Err(Exhausted { held: budget.own + had, limit: budget.limit });
        }
        pooled.fetch_add(1, order);
        Ok(place(true))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Account { budget, own, pooled } = &*self.account;
        if self.pooled {
            pooled.fetch_sub(1, Ordering::Relaxed);
            budget.left.fetch_add(1, Ordering::Relaxed);
        } else {
            own.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// As many as it gets.
    fn fill(account: &Arc<Account>) -> Vec<Place> {
        std::iter::from_fn(|| account.take().ok()).collect()
    }

    #[test]
    fn however_many_are_greedy_there_is_something_left() {
        let budget = Arc::new(Budget::of_mappings(4000));
        let accounts: Vec<_> = (0..9).map(|_| Account::new(Arc::clone(&budget))).collect();
        let mut held: Vec<_> = accounts.iter().map(fill).collect();
        let beyond: Vec<usize> = held.iter().map(|places| places.len() - OWN as usize).collect();
        assert_eq!(beyond[0], 500, "the first one leaves half of the pool");
        assert!(beyond.iter().sum::<usize>() < 1000 && beyond.iter().all(|&beyond| beyond > 0), "{beyond:?}");
        assert_eq!(accounts[0].take().unwrap_err(), Exhausted { held: OWN + 500, limit: 4000 });
        // What is given back is there for others, and what is nobody else's is there at any time.
        held.swap_remove(0);
        let late = fill(&Account::new(Arc::clone(&budget)));
        assert!(late.len() > OWN as usize + 200, "{}", late.len());
        drop((late, held));
        assert_eq!(fill(&accounts[0]).len(), OWN as usize + 500);
    }

    #[test]
    fn a_pool_that_is_empty_leaves_everybody_his_own() {
        let budget = Arc::new(Budget::of_mappings(7));
        let accounts: Vec<_> = (0..3).map(|_| Account::new(Arc::clone(&budget))).collect();
        let held: Vec<_> = accounts.iter().map(fill).collect();
        assert_eq!(held.iter().map(Vec::len).collect::<Vec<_>>(), [OWN as usize + 1, OWN as usize, OWN as usize]);
    }

    #[test]
    fn the_limit_is_the_kernels() {
        let budget = Budget::mappings_of_process();
        assert!(budget.limit >= 1000, "{budget:?}");
        assert!(Arc::ptr_eq(&budget, &Budget::mappings_of_process()), "there is one");
    }
}
