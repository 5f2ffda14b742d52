//! Can this host run a VM itself, and serve the page faults of one?

use std::io;

use kvm_ioctls::{Cap, Kvm};
use rustix::mm::UserfaultfdFlags;

use super::Check;

/// The only version that KVM ever had since it became stable.
const KVM_VERSION: i32 = 12;

/// KVM_CAP_DIRTY_LOG_RING_ACQ_REL: the ring as processors with weak memory ordering have it.
const RING_WITH_ORDERING: std::ffi::c_ulong = 223;

pub(super) fn check() -> Vec<Check> {
    let mut checks = kvm();
    checks.push(userfaultfd());
    checks
}

fn kvm() -> Vec<Check> {
    const NAME: &str = "kvm";
    const RING: &str = "kvm-dirty-ring";
    const USE: &str = "only VMs that run without it, or elsewhere, can be protected";
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            let error = io::Error::from_raw_os_error(error.errno());
            let advice = match error.kind() {
                io::ErrorKind::NotFound => "turn on virtualization in the firmware, and load kvm_intel or kvm_amd",
                io::ErrorKind::PermissionDenied => "add this user to the group kvm, or run as root",
                _ => "look at the kernel's log",
            };
            return vec![
                Check::warn(NAME, format!("/dev/kvm cannot be opened: {error}; {USE}"), advice),
                Check::skipped(RING, "KVM cannot be used"),
            ];
        }
    };
    let version = kvm.get_api_version();
    if version != KVM_VERSION {
        return vec![
            Check::warn(NAME, format!("KVM has version {version}, not {KVM_VERSION}"), "use another kernel"),
            Check::skipped(RING, "KVM cannot be used"),
        ];
    }
    let ring = kvm.check_extension_int(Cap::DirtyLogRing).max(kvm.check_extension_raw(RING_WITH_ORDERING));
    vec![
        Check::ok(NAME, format!("/dev/kvm can be opened, version {version}")),
        match u64::try_from(ring) {
            Ok(bytes @ 1..) => Check::ok(RING, format!("{} entries for each virtual processor", bytes / 16)),
            _ => Check::warn(
                RING,
                "this kernel has no dirty ring: dirty pages are found by scanning bitmaps",
                "use Linux 5.11 or newer; checkpoints work without it",
            ),
        },
    ]
}

fn userfaultfd() -> Check {
    const NAME: &str = "userfaultfd";
    const DEVICE: &str = "/dev/userfaultfd";
    let setting = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd")
        .map_or("unknown".to_owned(), |text| text.trim().to_owned());
    let called = open_userfaultfd();
    let device = std::fs::OpenOptions::new().read(true).write(true).open(DEVICE);
    let found = |how: &str| format!("{how}; vm.unprivileged_userfaultfd is {setting}");
    match (called, device) {
        (Ok(()), _) => Check::ok(NAME, found("the system call works")),
        (Err(_), Ok(_)) => Check::ok(NAME, found(&format!("{DEVICE} can be opened"))),
        (Err(error), Err(_)) => Check::warn(
            NAME,
            found(&format!("faults in the kernel cannot be served: {error}")),
            format!("run as root, let this user open {DEVICE}, or set vm.unprivileged_userfaultfd to 1"),
        ),
    }
}

/// Asks for a descriptor that is told of faults in the kernel too, as a VM's memory needs, and closes it.
fn open_userfaultfd() -> io::Result<()> {
    // SAFETY: no memory is registered with the descriptor, so that it can do nothing to this process.
    let opened = unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC) };
    Ok(opened.map(drop)?)
}
