//! Several hosts with one repository: what one commits, another sees when it asks, and none asks without need.

use std::time::Duration;

use epochfs::platform::clock::Stopwatch;

use crate::server::{ceph, skip};
use crate::world::{Host, noise};

fn mounted(host: &Host) -> String {
    let at = host.path("mount");
    std::fs::create_dir(&at).unwrap();
    let at = at.to_str().unwrap().to_owned();
    host.ok(["mount", &at, "--background"]);
    at
}

#[test]
fn another_host_sees_an_epoch_within_a_second_and_idle_machines_cost_nothing() {
    if !rustix::process::geteuid().is_root() {
        return skip("two hosts", "only root mounts here");
    }
    let Some(server) = ceph("two hosts") else { return };
    let one = Host::new(&server);
    let two = one.another();
    let (at_one, at_two) = (mounted(&one), mounted(&two));
    std::fs::create_dir(format!("{at_one}/web1")).unwrap();
    for number in 1..=3_u64 {
        let memory = noise(number, 500_000);
        std::fs::write(format!("{at_one}/web1/live/memory"), &memory).unwrap();
        let epoch = one.ok(["commit", "web1", "--json"]).json()["epoch"].as_u64().unwrap();
        let began = Stopwatch::start();
        loop {
            let latest = std::fs::read_link(format!("{at_two}/web1/latest")).ok();
            if latest.is_some_and(|link| link.ends_with(epoch.to_string())) {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(1), "epoch {epoch} is not seen");
        }
        assert!(std::fs::read(format!("{at_two}/web1/latest/memory")).unwrap() == memory);
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        assert!(std::fs::read(format!("{at_two}/web1/epochs/{epoch}/memory")).unwrap() == memory);
    }
    // The machine belongs to the first host: the second may not write to it.
    assert_eq!(std::fs::write(format!("{at_two}/web1/live/memory"), b"x").unwrap_err().raw_os_error(), Some(30));
    // Nobody asks for anything, and nothing is asked of the service.
    let requests = |host: &Host| {
        let status = host.ok(["status", "--json"]).json();
        let store = &status["daemons"][0]["store"];
        ["reads", "writes", "lists", "deletes"]
            .map(|name| store["requests"][name].as_u64().unwrap())
            .iter()
            .sum::<u64>()
    };
    let before = (requests(&one), requests(&two));
    std::thread::sleep(Duration::from_secs(5));
    let after = (requests(&one), requests(&two));
    assert!(after.0 <= before.0 + 2 && after.1 <= before.1 + 2, "{before:?} {after:?}");
    two.ok(["umount", &at_two]);
    one.ok(["umount", &at_one]);
    // Given up cleanly: now the second host may.
    let at_two = {
        two.ok(["mount", &at_two, "--background"]);
        at_two
    };
    std::fs::write(format!("{at_two}/web1/live/more"), b"x").unwrap();
    two.ok(["commit", "web1"]);
    two.ok(["umount", &at_two]);
}
