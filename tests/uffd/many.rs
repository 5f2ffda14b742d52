//! Many VMs at one server, each with its own memory.

use std::time::Duration;

use rustix::process::Signal;

use crate::fixture::{GuestProcess, Program, Watchdog, World, is_long, wait_until};

const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn p5_many_vms_at_once_see_their_own_bytes() {
    let Some(world) = World::new("many VMs", 1024) else { return };
    let mut program = Program::start(&world, &[]);
    let mut guests: Vec<_> = (0..if is_long() { 200 } else { 24 })
        .map(|number| {
            let mut orders = world.orders(number);
            orders.operations = 600;
            orders.threads = 2;
            GuestProcess::start(&orders)
        })
        .collect();
    let _watchdogs: Vec<_> = guests.iter().map(|guest| Watchdog::new(guest.pid(), PATIENCE)).collect();
    for guest in &mut guests {
        for text in ["ready", "done", "ok"] {
            guest.must_say(text);
        }
    }
    let count = guests.len();
    drop(guests);
    // Told to end before, it says which of them go on needing it.
    wait_until("all have ended", || program.log().matches(" ended: ").count() == count);
    program.signal(Signal::TERM);
    assert!(program.ended(PATIENCE).success(), "{}", program.log());
    let log = program.log();
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
}
