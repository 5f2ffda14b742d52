//! The page-fault server: VMs whose memory is filled from an epoch while they run, by userfaultfd.
//!
//! A VM monitor hands over a descriptor (`lobby`), by which the kernel tells of each page that is touched before it is
//! there (`message`, `faults`) and takes its content (`descriptor`, `vm`). What the VM gives up is zeros from then on;
//! that is written down where the next server finds it (`ledger`), should this one die. Memory can be filled ahead of its
//! use (`populate`). A page is the epoch's, or zeros if it was removed: a VM for which that cannot be had is killed or held.
//!
//! [`Server`] serves within a process. `supervise` runs one in a child process, and hands its VMs to a successor when it
//! dies.

mod channel;
mod descriptor;
mod faults;
mod image;
mod layout;
mod ledger;
mod listen;
mod lobby;
mod message;
mod offload;
mod peer;
mod populate;
mod server;
mod supervisor;
mod vm;
mod worker;

pub use channel::{Channel, FromWorker, Ready};
pub use descriptor::{Filled, Missing, Userfaultfd};
pub use image::Image;
pub use layout::{Layout, Region};
pub use ledger::Ledger;
pub use lobby::Lobby;
pub use message::Message;
pub use offload::{Offload, Served};
pub use peer::Peer;
pub use populate::Outcome;
pub use server::{OnDamage, Options, Server};
pub use supervisor::{News, Supervision, supervise};
pub use vm::{Admission, End, Pushed, Vm, VmStatus};
pub use worker::{offload, work};
