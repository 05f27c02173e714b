//! What the service manager is told (sd_notify(3)); nothing when there is none. Nobody waits for its answer.

use sd_notify::NotifyState;

use crate::control::report::StatusReport;

/// The daemon serves. Returns whether the manager wants to be told every now and then that it still does.
pub(super) fn ready() -> bool {
    tell(&[NotifyState::Ready]);
    sd_notify::watchdog_enabled().is_some()
}

/// A new configuration is being applied.
pub(super) fn reloading() {
    // `Type=notify-reload` wants the time with it, to tell this reload from an earlier one.
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(_) => tell(&[NotifyState::Reloading]),
    }
}

/// The new configuration was applied, or refused.
pub(super) fn reloaded() {
    tell(&[NotifyState::Ready]);
}

/// The daemon ends.
pub(super) fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// The daemon's threads answer; for the watchdog.
pub(super) fn alive() {
    tell(&[NotifyState::Watchdog]);
}

/// What `systemctl status` shows.
pub(super) fn tell_status(status: &StatusReport) {
    let (up, down, stopped) = (status.ports_up, status.ports_down, status.ports_stopped.len());
    tell(&[NotifyState::Status(&format!("ports: {up} up, {down} down, {stopped} stopped"))]);
}

fn tell(states: &[NotifyState<'_>]) {
    // Without a manager there is nobody to tell, and one that is gone does not matter to the switch.
    let _ = sd_notify::notify(states);
}
