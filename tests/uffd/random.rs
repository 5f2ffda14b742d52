//! P5, honest bytes: what a VM sees is its epoch, zeros where it gave pages up, or what it wrote, whatever the store, the
//! population and other processors do meanwhile.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use epochfs::epoch::EpochStore;
use epochfs::platform::store::faulty::Rates;
use epochfs::restore::{Prefetcher, Settings};
use epochfs::uffd::{Admission, Filled, Ledger, Lobby, OnDamage, Options};
use rustix::io::Errno;

use crate::fixture::{GuestProcess, Watchdog, World, is_long, seed, wait_until};

const PATIENCE: Duration = Duration::from_secs(120);

fn seeds() -> std::ops::Range<u64> {
    seed()..seed() + if is_long() { 60 } else { 6 }
}

/// Runs a guest to its end, and returns the last that it says.
fn outcome(guest: &mut GuestProcess) -> String {
    let _watchdog = Watchdog::new(guest.pid(), PATIENCE);
    let mut last = "nothing".to_owned();
    while let Some(said) = guest.says() {
        last = said;
        if last == "ok" || last.starts_with("WRONG") {
            break;
        }
    }
    last
}

#[test]
fn p5_a_guest_sees_its_epoch_zeros_or_what_it_wrote() {
    for seed in seeds() {
        let Some(world) = World::with_len("random guests", (2048 + 13) * 4096 - 100) else { return };
        let rates =
            Rates { error_before: 20, delay: 30, corrupt_read: 4, truncated_read: 4, vanished: 4, ..Rates::default() };
        let (image, faulty) = world.faulty_image(seed, if seed % 3 == 2 { Rates::default() } else { rates });
        let options = Options { populate: seed % 2 == 1, ..Options::default() };
        let server = world.server_of(image, options);
        faulty.set_enabled(true);
        let mut orders = world.orders(seed);
        // The last page of the memory is the one that the stream ends in.
        let pages = world.len.div_ceil(4096);
        orders.regions[0].0 = (pages * 4096) - orders.regions[0].1;
        let mut guest = GuestProcess::start(&orders);
        let said = outcome(&mut guest);
        assert_eq!(said, "ok", "seed {seed}: {:?}, {} faults of the store", server.vms(), faulty.events().len());
        if seed % 3 != 2 {
            assert!(!faulty.events().is_empty());
        }
    }
}

#[test]
fn p5_pages_pushed_in_any_order_are_right() {
    let Some(world) = World::new("pushed pages", 2048) else { return };
    let touched = Arc::new(AtomicBool::new(false));
    let (server, seen) = {
        let seen = touched.clone();
        let options = Options {
            touched: Some(Arc::new(move |_, page| {
                assert!(page < 2048);
                seen.store(true, Ordering::Relaxed);
            })),
            ..Options::default()
        };
        (world.server(options), touched)
    };
    let mut guest = GuestProcess::start(&world.orders(3));
    wait_until("the guest is there", || server.vms().len() == 1);
    let id = server.vms()[0].id;
    let (sender, receiver) = std::sync::mpsc::channel();
    // Backwards, with a gap, twice over, and past the end.
    let ranges: Vec<_> = (0..64).rev().map(|n| n * 32..n * 32 + 20).chain([0..4096, 5000..5010]).collect();
    server.populate(id, &ranges, move |outcome| sender.send(outcome).unwrap()).unwrap();
    assert_eq!(outcome(&mut guest), "ok");
    let populated = receiver.recv_timeout(PATIENCE).unwrap();
    assert!(populated.filled > 100, "{populated:?}");
    assert!(seen.load(Ordering::Relaxed), "pages were touched before they were there, and nobody was told");
}

#[test]
fn p5_what_an_earlier_restore_touched_is_pushed_and_right() {
    let Some(world) = World::new("traces", 2048) else { return };
    let mut pushed: Vec<u64> = Vec::new();
    // On a busy host a guest may have all that it wants before anything can be pushed: a later one has not.
    while pushed.len() < 2 || pushed.len() < 8 && pushed.last() <= Some(&20) {
        let store = Arc::new(EpochStore::open_directory(&world.path("repository")).unwrap());
        let settings = Settings { threads: 2, rate: None, keeps_traces: true };
        let prefetcher = Arc::new(Prefetcher::start(store, settings).unwrap());
        let server = world.server(Options { prefetcher: Some(prefetcher.clone()), ..Options::default() });
        let mut orders = world.orders(8);
        orders.removes = false;
        orders.operations = 2000;
        orders.pause_us = 1000;
        orders.waits = true;
        let mut guest = GuestProcess::start(&orders);
        let _watchdog = Watchdog::new(guest.pid(), PATIENCE);
        guest.must_say("ready");
        guest.must_say("done");
        pushed.push(server.vms()[0].pushed_pages);
        guest.tell();
        guest.must_say("ok");
        drop(guest);
        wait_until("the guest is gone", || server.vms().is_empty());
        prefetcher.stop();
    }
    assert!(pushed[0] == 0 && pushed.last() > Some(&20), "{pushed:?} pages were pushed");
}

/// A server as one writes it first: each message by itself, and removals are not its business.
fn serve_naively(admission: &Admission, image: &std::fs::File) {
    let mut idle = 0;
    while !admission.peer.has_ended() && idle < 20_000 {
        let mut message = [0; 32];
        match rustix::io::read(admission.uffd.as_fd(), &mut message) {
            Ok(32) => idle = 0,
            Ok(_) | Err(Errno::AGAIN) => {
                idle += 1;
                std::thread::sleep(Duration::from_micros(100));
                continue;
            }
            Err(error) => panic!("{error}"),
        }
        if message[0] != 0x12 {
            continue;
        }
        let address = u64::from_ne_bytes(message[16..24].try_into().unwrap()) / 4096 * 4096;
        let region = admission.layout.at(address).unwrap();
        let mut page = [0; 4096];
        let _ = image.read_at(&mut page, address - region.start + region.offset).unwrap();
        while admission.uffd.copy(address, &page) == Ok(Filled::Busy) {
            // A removal is queued: the naive server reads it, and forgets it.
            let _ = rustix::io::read(admission.uffd.as_fd(), &mut [0; 32]);
        }
    }
}

#[test]
fn canary_a_server_that_ignores_removals_is_noticed() {
    let Some(world) = World::new("the naive server", 2048) else { return };
    let mut lobby = Lobby::open(&world.socket(), "the naive".into(), world.len as u64, OnDamage::Hold).unwrap();
    let mut orders = world.orders(1);
    orders.threads = 1;
    let mut guest = GuestProcess::start(&orders);
    let mut admitted = Vec::new();
    wait_until("the guest is there", || {
        admitted.extend(lobby.step());
        !admitted.is_empty()
    });
    let image = std::fs::File::open(&world.image).unwrap();
    let serving = std::thread::spawn(move || serve_naively(&admitted[0], &image));
    let said = outcome(&mut guest);
    assert!(said.starts_with("WRONG page") && said.contains("it was removed"), "{said}");
    drop(guest);
    serving.join().unwrap();
}

/// One server after the other, with what the first one wrote down or without it.
fn served_twice(keeps_ledger: bool) -> Option<String> {
    let world = World::new("two servers", 2048)?;
    let mut lobby =
        Lobby::open(&world.socket(), "one after the other".into(), world.len as u64, OnDamage::Hold).unwrap();
    let mut orders = world.orders(5);
    orders.waits = true;
    orders.operations = 6000;
    let mut guest = GuestProcess::start(&orders);
    let mut admitted = Vec::new();
    wait_until("the guest is there", || {
        admitted.extend(lobby.step());
        !admitted.is_empty()
    });
    let first = admitted.remove(0);
    let copy = |ledger| Admission {
        layout: first.layout.clone(),
        uffd: epochfs::uffd::Userfaultfd::adopted(first.uffd.try_clone().unwrap()),
        peer: first.peer.try_clone().unwrap(),
        ledger,
        connection: None,
    };
    let ledger = || Ledger::of(first.ledger.try_clone().unwrap());
    let server = epochfs::uffd::Server::new(world.image(), Options::default()).unwrap();
    server.serve(1, copy(ledger())).unwrap();
    guest.must_say("ready");
    guest.must_say("done");
    drop(server);
    let server = epochfs::uffd::Server::new(world.image(), Options::default()).unwrap();
    let ledger = if keeps_ledger { ledger() } else { Ledger::new(world.len as u64).unwrap() };
    server.serve(1, copy(ledger)).unwrap();
    guest.tell();
    Some(outcome(&mut guest))
}

#[test]
fn p5_a_successor_knows_what_was_removed() {
    let Some(said) = served_twice(true) else { return };
    assert_eq!(said, "ok");
}

#[test]
fn canary_a_successor_that_does_not_know_what_was_removed_is_noticed() {
    let Some(said) = served_twice(false) else { return };
    assert!(said.starts_with("WRONG page") && said.contains("it was removed"), "{said}");
}
