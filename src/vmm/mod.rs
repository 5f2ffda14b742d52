//! Starting virtual machine monitors from epochs on a mount: what each of them wants to be told, and in which order.
//!
//! A monitor reads the epoch's memory when the machine touches it. Nothing here copies memory, and nothing is left
//! behind by a restore that fails: no process, no socket, no clone.

pub mod agent;
mod child;
mod cloud_hypervisor;
mod feed;
mod firecracker;
mod http;
pub mod kvm;
mod place;
mod qemu;
mod qemu_command;
mod qemu_state;
mod qmp;

pub use child::{Ended, Event, Output, Watch};
pub use cloud_hypervisor::{CloudHypervisor, Prepared};
pub use feed::{Daemon, Feed, Moments, Wanted};
pub use firecracker::{Backend, Firecracker};
pub use place::{MadeClone, Place, stream_len};
pub use qemu::{MonitorPlace, Qemu, Running, saved_ram};
pub use qemu_command::{CommandLine, Memory, Ram};
