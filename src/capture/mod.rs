//! Capturing the memory of running VMs, for authors of monitors that use KVM.
//!
//! A guest's memory becomes epochs while it runs. What it writes to is told by a [`Tracker`]: KVM's dirty log
//! ([`DirtyLog`]) or dirty ring ([`DirtyRing`]). [`Capture`] moves that into a set of its own, from which a page goes only
//! when an epoch that holds it is durable. A checkpoint has four steps:
//!
//! 1. [`Capture::copy_ahead`] copies what is dirty so far, while the guest runs.
//! 2. The monitor stops its processors, and [`Capture::freeze`] takes what has become dirty since: short runs of pages are
//!    copied, long ones protected against writes by userfaultfd. The monitor saves its devices' state.
//! 3. The guest goes on. Meanwhile [`Moment::add_to`] reads the pages into a commit: copies, and protected pages in place. A
//!    page that the guest writes to before it was read is copied first; if the buffer for copies is full, the guest waits for
//!    that page.
//! 4. Once the commit is finished, [`Moment::durable`] makes its pages clean. If anything failed, the moment is dropped, and
//!    the next one has its pages.
//!
//! The pause therefore depends on what the guest writes to in the time of step 1, and neither on the size of its memory nor
//! on the store. Memory beyond the guest's is the buffer ([`Settings::buffer_pages`]), a bit a page for each of four sets, and
//! what the commit takes.
//!
//! [`Protection`] does all this in a loop, for whoever implements [`Vm`] and has a [`Pace`].
//! `tests/examples/capture.rs` is a whole program; `src/vmm/kvm` is a monitor that uses it.
//!
//! What a monitor must see to:
//! - The slots are set up with `KVM_MEM_LOG_DIRTY_PAGES`, or the VM has dirty rings, before the guest first runs.
//! - What the monitor itself writes to the guest's memory, such as a device's buffers, is told to [`Capture::mark`], before
//!   the next pause ends.
//! - The memory is anonymous, a memfd, or on tmpfs or hugetlbfs: the kernel protects no other. Transparent huge pages are
//!   best turned off for it, as protection splits them.
//! - The threads of a monitor that write to the guest's memory may have to wait as the guest does, so none of them may be the
//!   one that commits.
//! - A client may have seen what a guest sent after its last durable epoch, and a restored guest has not. Who cannot have
//!   that holds what the guest sends back until the epoch after it is durable: [`Protection::run`] tells of each.

mod audit;
mod backing;
mod buffer;
mod capturing;
mod faults;
mod frozen;
mod memory;
mod moment;
mod pages;
mod protect;
mod ring;
mod tracker;

pub use audit::Expected;
pub use backing::EpochPages;
pub use capturing::{Base, Capture, Facts, Settings};
pub use faults::Backing;
pub use memory::{GuestMemory, Region};
pub use moment::Moment;
pub use pages::PageSet;
pub use protect::{Checkpoint, Fixed, Pace, Protection, Stop, Vm};
pub use ring::{DirtyRing, EXIT_RING_FULL};
pub use tracker::{DirtyLog, Tracker};
