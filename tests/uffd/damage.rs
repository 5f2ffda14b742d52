//! P5: a store that fails, and one that is damaged. A VM waits, or is killed; it never sees a byte that is not its own.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use epochfs::platform::store::faulty::Rates;
use epochfs::uffd::{OnDamage, Options};

use crate::fixture::{GuestProcess, Program, Watchdog, World, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn p5_a_vm_with_a_damaged_page_is_killed_and_the_log_names_it() {
    let Some(world) = World::new("damaged pages", 4096) else { return };
    let objects = world.damage();
    let program = Program::start(&world, &[]);
    let mut guest = GuestProcess::start(&world.orders(1));
    let _watchdog = Watchdog::new(guest.pid(), PATIENCE);
    guest.must_say("ready");
    assert_eq!(guest.says(), None, "it went on with damaged memory");
    assert_eq!(guest.ended(PATIENCE).signal(), Some(9));
    wait_until("the log says so", || program.log().contains("killed process"));
    let log = program.log();
    let line = log.lines().find(|line| line.contains("killed process")).unwrap();
    assert!(line.contains("ERROR") && line.contains(&format!("killed process {}", guest.pid())), "{line}");
    assert!(line.contains("of memory of web1@1 cannot be read") && line.contains("page "), "{line}");
    assert!(objects.iter().any(|object| line.contains(object)), "{line} names none of {objects:?}");
}

#[test]
fn p5_a_vm_with_a_damaged_page_can_be_held_until_it_is_repaired() {
    let Some(world) = World::new("held VMs", 2048) else { return };
    let (image, faulty) = world.faulty_image(1, Rates { vanished: 1000, ..Rates::default() });
    let server = world.server_of(image, Options { on_damage: OnDamage::Hold, ..Options::default() });
    faulty.set_enabled(true);
    let mut guest = GuestProcess::start(&world.orders(1));
    let _watchdog = Watchdog::new(guest.pid(), PATIENCE);
    guest.must_say("ready");
    wait_until("pages are tried", || server.vms().first().is_some_and(|vm| vm.retries > 5));
    std::thread::sleep(Duration::from_millis(200));
    assert!(guest.is_running());
    faulty.set_enabled(false);
    guest.must_say("done");
    guest.must_say("ok");
}

#[test]
fn p5_a_store_that_is_away_for_a_while_is_waited_for() {
    let Some(world) = World::new("a store that is away", 2048) else { return };
    let (image, faulty) = world.faulty_image(1, Rates { error_before: 1000, ..Rates::default() });
    let server = world.server_of(image, Options { populate: true, ..Options::default() });
    faulty.set_enabled(true);
    let mut guest = GuestProcess::start(&world.orders(1));
    let _watchdog = Watchdog::new(guest.pid(), PATIENCE);
    guest.must_say("ready");
    wait_until("pages are tried", || server.vms().first().is_some_and(|vm| vm.retries > 10));
    faulty.set_enabled(false);
    guest.must_say("done");
    guest.must_say("ok");
}

#[test]
fn p5_patience_with_a_store_ends() {
    let Some(world) = World::new("patience", 1024) else { return };
    let (image, faulty) = world.faulty_image(1, Rates { error_before: 1000, ..Rates::default() });
    let _server = world.server_of(image, Options { patience: Duration::from_millis(300), ..Options::default() });
    faulty.set_enabled(true);
    let mut guest = GuestProcess::start(&world.orders(1));
    let _watchdog = Watchdog::new(guest.pid(), PATIENCE);
    guest.must_say("ready");
    assert_eq!(guest.says(), None);
    assert_eq!(guest.ended(PATIENCE).signal(), Some(9));
}
