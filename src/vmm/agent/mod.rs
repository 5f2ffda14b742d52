//! Capturing running machines: what is done with each kind of monitor, so that all of a machine's files on the mount are of
//! one moment, and the machine stands still for as short a time as can be.

mod guard;
mod qemu;

use std::time::Duration;

pub use guard::{Guard, guard};
pub use qemu::{QemuAgent, QemuPlace};

use crate::error::Result;

/// What a capture did to a machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Capture {
    /// For how long the machine stood still, and what that time went into, in order.
    pub pause: Duration,
    pub parts: Vec<(&'static str, Duration)>,
    /// What was done before, while it ran: how long, and how often its memory was gone through.
    pub prepared: Duration,
    pub rounds: u32,
}

/// What a machine is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    Running,
    /// It stands still, and not for us: there is nothing new to capture.
    Idle(String),
    /// It is gone or does not answer.
    Lost(String),
}

/// One machine's monitor.
pub trait Agent: Send {
    /// How the machine is.
    fn health(&mut self) -> Health;

    /// Stops the machine, has its state and memory in its files on the mount, calls `freeze`, and lets it go on; what can
    /// be done before is done while it runs. Whatever fails, the machine runs afterwards.
    fn capture(&mut self, freeze: &mut dyn FnMut() -> Result<()>) -> Result<Capture>;
}
