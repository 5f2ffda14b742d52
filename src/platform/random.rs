//! Random identifiers from the kernel.

use rustix::rand::{GetRandomFlags, getrandom};

/// Sixteen random bytes: unique for every pack, writer and repository.
pub fn id16() -> [u8; 16] {
    let mut id = [0_u8; 16];
    let mut filled = 0;
    while filled < id.len() {
        match getrandom(&mut id[filled..], GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("the kernel gave no random bytes: {error}"),
        }
    }
    id
}
