//! Memory of huge pages, of 2 MiB.

use std::time::Duration;

use epochfs::platform::store::faulty::Rates;
use epochfs::uffd::Options;

use crate::fixture::{GuestProcess, Watchdog, World, skip, wait_until};
use crate::vmm::{HUGE, free_huge_pages};

const COUNT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Huge pages that the kernel was asked for, and gets back.
struct Reserved(Option<usize>);

impl Reserved {
    /// Nothing where there are none to be had.
    fn new(wanted: usize) -> Option<Self> {
        if free_huge_pages() >= wanted {
            return Some(Self(None));
        }
        let before: usize = std::fs::read_to_string(COUNT).ok()?.trim().parse().ok()?;
        let reserved = Self(Some(before));
        std::fs::write(COUNT, (before + wanted).to_string()).ok()?;
        (free_huge_pages() >= wanted).then_some(reserved)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Some(before) = self.0 {
            let _ = std::fs::write(COUNT, before.to_string());
        }
    }
}

#[test]
fn p5_huge_pages_are_filled_whole() {
    const PAGES: usize = 8;
    const TEST: &str = "huge pages";
    for populate in [false, true] {
        // The last huge page is cut off by the end of the stream.
        let Some(world) = World::with_len(TEST, PAGES * HUGE - 3 * 4096) else { return };
        let Some(_reserved) = Reserved::new(PAGES) else {
            skip(TEST, "the kernel has no huge pages to give");
            return;
        };
        let (image, faulty) = world.faulty_image(1, Rates { error_before: 20, delay: 20, ..Rates::default() });
        let server = world.server_of(image, Options { populate, ..Options::default() });
        faulty.set_enabled(true);
        let mut orders = world.orders(4);
        orders.regions = vec![(5 * HUGE, 3 * HUGE, HUGE), (3 * HUGE, 0, HUGE)];
        orders.operations = 4000;
        orders.removes = false;
        let mut guest = GuestProcess::start(&orders);
        let _watchdog = Watchdog::new(guest.pid(), Duration::from_secs(60));
        for text in ["ready", "done", "ok"] {
            guest.must_say(text);
        }
        drop(guest);
        wait_until("it is gone", || server.vms().is_empty());
    }
}
