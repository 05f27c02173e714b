//! A stand-in for the ring engine: it keeps what it is told and moves no frames.
#![allow(dead_code, missing_docs)]

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ident::MacAddr;
use crate::mem::GuestMemory;
use crate::sys::eventfd::EventFd;

pub(super) struct RingSetup {
    pub(super) size: u16,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    pub(super) base: u16,
    pub(super) features: u64,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) kick: OwnedFd,
    pub(super) call: Option<OwnedFd>,
}

#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum RingError {
    #[error("the ring runs already")]
    Running,
    #[error("the {0} area is not in shared memory")]
    Unmapped(&'static str),
}

#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub(super) struct RingFault(pub String);

#[derive(Debug, Default, serde::Serialize)]
pub(super) struct QueueReport {
    pub(super) kicks: u64,
    pub(super) calls: u64,
    pub(super) calls_suppressed: u64,
}

#[derive(Default)]
struct State {
    running: Option<RingSetup>,
    fault: Option<RingFault>,
    enabled: bool,
}

pub(super) struct Queue {
    state: Mutex<State>,
    attention: Arc<EventFd>,
}

impl Queue {
    pub(super) fn new(attention: Arc<EventFd>) -> Self {
        Self { state: Mutex::default(), attention }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn start(&self, setup: RingSetup) -> Result<(), RingError> {
        let mut state = self.state();
        if state.running.is_some() {
            return Err(RingError::Running);
        }
        let n = u32::from(setup.size);
        for (name, at, len) in [
            ("descriptor", setup.descriptors, 16 * n),
            ("available", setup.available, 6 + 2 * n),
            ("used", setup.used, 6 + 8 * n),
        ] {
            setup.memory.span(at, len, &mut 0).ok_or(RingError::Unmapped(name))?;
        }
        state.fault = None;
        state.running = Some(setup);
        Ok(())
    }

    pub(super) fn stop(&self) -> Option<u16> {
        self.state().running.take().map(|setup| setup.base)
    }

    pub(super) fn is_running(&self) -> bool {
        self.state().running.is_some()
    }

    pub(super) fn enable(&self, enabled: bool) {
        self.state().enabled = enabled;
    }

    pub(super) fn set_call(&self, call: Option<OwnedFd>) {
        if let Some(setup) = &mut self.state().running {
            if let Some(call) = &call {
                let _ = rustix::io::write(call, &1u64.to_ne_bytes());
            }
            setup.call = call;
        }
    }

    pub(super) fn set_kick(&self, kick: OwnedFd) {
        if let Some(setup) = &mut self.state().running {
            setup.kick = kick;
        }
    }

    pub(super) fn set_memory(&self, memory: &Arc<GuestMemory>) -> Result<(), RingFault> {
        let mut state = self.state();
        let Some(setup) = &mut state.running else { return Ok(()) };
        setup.memory = Arc::clone(memory);
        if memory.span(setup.descriptors, 1, &mut 0).is_some() {
            return Ok(());
        }
        let fault = RingFault("the memory that holds the ring is no longer shared".into());
        state.running = None;
        state.fault = Some(fault.clone());
        Err(fault)
    }

    pub(super) fn fault(&self) -> Option<RingFault> {
        self.state().fault.clone()
    }

    pub(super) fn announce(&self, _mac: MacAddr) {}

    pub(super) fn report(&self) -> QueueReport {
        QueueReport::default()
    }
}
