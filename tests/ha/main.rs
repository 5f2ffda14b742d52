//! Protection without a hypervisor: a monitor that fails wherever it can, and the policy in simulated time. A real guest is
//! protected, killed and restored by `scripts/guest-protected`.

mod api;
mod monitor;
mod outputs;
mod qemu;
mod scenarios;
