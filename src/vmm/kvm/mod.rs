//! A small monitor on KVM, for guests of our own: `epochfs run`.
//!
//! It is a real one: memory with a hole, processors in threads, KVM's interrupt controllers and timer, a serial port. It is
//! what the capture library is tested and measured with, and an example of how a monitor uses it.

mod assembler;
mod guest;
mod kick;
mod machine;
mod processor;
mod run;
mod serial;
mod shape;
mod state;
mod vmstate;

pub use guest::{
    BOARD, BOARD_LEN, Counter, Guest, INCREMENT, Load, MULTIPLIER, REPORTED, Report, TICKS, WORK_START, seed_of,
};
pub use machine::{Machine, Made, Output, Spec, Tracking, time_stamp_khz};
pub use processor::{Board, Event};
pub use run::{Ended, MEMORY, Orders, Runner, STATE, Wrap, own, read_state, run};
pub use shape::MemoryShape;
pub use vmstate::{Part, VmState};

use crate::error::Error;

/// Says what KVM refused.
fn kvm_error(what: &str) -> impl FnOnce(vmm_sys_util::errno::Error) -> Error + '_ {
    move |error| Error::io(what, std::io::Error::from_raw_os_error(error.errno()))
}
