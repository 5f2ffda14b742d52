//! The guests by themselves: they run to their end, and notice what is done to them.

use std::time::Duration;

use epochfs::capture::Vm;
use epochfs::platform::clock::Stopwatch;
use epochfs::vmm::kvm::{BOARD, Counter, Event, Guest, Load, Report, TICKS, time_stamp_khz};

use crate::fixture::{boot, can_run, shape, spec, wait_finished};
use crate::oracle::Oracle;

const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn a_counter_counts_to_its_end_on_two_processors_past_a_hole() {
    if !can_run("a_counter_counts_to_its_end_on_two_processors_past_a_hole") {
        return;
    }
    let shape = shape(8, 4);
    let guest = Guest::Counter(Counter { target: 20_000, sweep_bits: Some(13), print_bits: Some(13), has_timer: true });
    let (mut made, _, printed) = boot(&spec(shape, 2), &guest);
    made.machine.resume().unwrap();
    wait_finished(&made.machine, 2, MINUTE);
    made.machine.pause().unwrap();
    let memory = &made.memory;
    let counts = [0, 1].map(|processor| memory.word(BOARD + processor * 256).unwrap());
    assert_eq!(counts, [20_000; 2]);
    let mut bytes = vec![[0; 4096]; memory.pages() as usize];
    memory.copy_pages(0, &mut bytes);
    Oracle::new(shape, 2).check(&counts, bytes.as_flattened());
    assert_eq!(printed.text(), "0000000000002000\n0000000000004000\n");
    assert!(memory.word(TICKS).unwrap() > 10, "the timer interrupts");
    made.machine.state().unwrap();
}

#[test]
fn a_load_writes_at_its_rate() {
    if !can_run("a_load_writes_at_its_rate") {
        return;
    }
    const RATE: u64 = 2000;
    let period = u64::from(time_stamp_khz().unwrap()) * 1000 / RATE;
    let guest = Guest::Load(Load { period, ..Load::default() });
    let (mut made, _, _) = boot(&spec(shape(16, 64), 1), &guest);
    made.machine.resume().unwrap();
    let since = Stopwatch::start();
    // As many as it can on a busy machine, and never more.
    while made.memory.word(BOARD).unwrap() < 1000 {
        assert!(since.elapsed() < MINUTE, "{} writes", made.memory.word(BOARD).unwrap());
        std::thread::sleep(Duration::from_millis(10));
    }
    made.machine.pause().unwrap();
    let (writes, most) = (made.memory.word(BOARD).unwrap(), since.elapsed().as_secs_f64() * RATE as f64 + 10.0);
    assert!((writes as f64) < most, "{writes} writes, at most {most:.0}");
}

#[test]
fn an_idle_guest_changes_nothing() {
    if !can_run("an_idle_guest_changes_nothing") {
        return;
    }
    let (mut made, _, _) = boot(&spec(shape(4, 4096), 1), &Guest::Idle);
    let bytes = |memory: &epochfs::capture::GuestMemory| {
        let mut bytes = vec![[0; 4096]; memory.pages() as usize];
        memory.copy_pages(0, &mut bytes);
        bytes
    };
    // The first time it runs, its processor marks the page tables that it uses.
    let seen = [(); 3].map(|()| {
        made.machine.resume().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        made.machine.pause().unwrap();
        made.machine.state().unwrap();
        bytes(&made.memory)
    });
    assert!(seen[0] == seen[1] && seen[1] == seen[2], "it wrote to memory");
}

/// A guest whose memory is changed behind its back says so: what the other tests lean on.
#[test]
fn a_counter_notices_what_is_wrong() {
    if !can_run("a_counter_notices_what_is_wrong") {
        return;
    }
    let guest = Guest::Counter(Counter { sweep_bits: Some(10), ..Counter::default() });
    for (what, changed, expected) in [("an old pair", 0, Report::WrongSum), ("a wrong pair", 1, Report::WrongPair)] {
        let (mut made, _, _) = boot(&spec(shape(4, 4096), 1), &guest);
        made.machine.resume().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        made.machine.pause().unwrap();
        // Some pair that was counted.
        let address = (0x20_0000..0x40_0000).step_by(1024).find(|at| made.memory.word(*at).unwrap() > 0).unwrap();
        let pair = if changed == 0 { [0; 16] } else { [0x55; 16] };
        made.memory.write(address, &pair).unwrap();
        made.machine.resume().unwrap();
        match made.machine.wait(MINUTE / 6) {
            Some(Event::Report(0, report)) => assert_eq!(report, expected, "{what}"),
            event => {
                let count = made.memory.word(BOARD).unwrap();
                made.machine.pause().unwrap();
                panic!("{what} at {address:#x}: {event:?}; {count} counts, {} now", made.memory.word(BOARD).unwrap())
            }
        }
    }
}
