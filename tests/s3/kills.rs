//! P1: what was acknowledged is there after servers are killed and started again, in the middle of commits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use epochfs::platform::random::Seeded;

use crate::server::{Server, has_ceph, is_long};
use crate::world::{Ended, Host, noise};

const MACHINES: usize = 3;

/// Commits to machines while servers are killed and started, and then compares every acknowledged epoch.
fn torture(server: &Arc<Server>, kills: &[&[&str]], pause: Duration) {
    let host = Host::new(server);
    let gateways: Vec<&str> = server.variables["GATEWAYS"].split(' ').collect();
    let (done, failed) = (AtomicBool::new(false), AtomicUsize::new(0));
    let acknowledged = std::thread::scope(|scope| {
        let (done, failed, host) = (&done, &failed, &host);
        let writers: Vec<_> = (0..MACHINES)
            .map(|number| {
                let gateway = gateways[number % gateways.len()].to_owned();
                scope.spawn(move || {
                    let writer = Host::at(&host.server, &host.url, &gateway);
                    let machine = format!("m{number}");
                    let mut memory = noise(number as u64, 400_000);
                    let mut seeded = Seeded::new(number as u64 + 100);
                    let mut epochs = Vec::new();
                    while !done.load(Ordering::SeqCst) {
                        // Sometimes within the record, sometimes with a pack.
                        let len = if seeded.chance(500) { 50 } else { 300_000 };
                        let at = seeded.below((memory.len() - len) as u64) as usize;
                        memory[at..at + len].copy_from_slice(&noise(seeded.next(), len));
                        let ran = writer.commit(&machine, &memory);
                        if ran.code == 0 {
                            epochs.push((ran.json()["epoch"].as_u64().unwrap(), memory.clone()));
                        } else {
                            failed.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                    (machine, epochs)
                })
            })
            .collect();
        // Writers end also if something below fails.
        let ended = Ended(done);
        for names in kills {
            std::thread::sleep(pause);
            server.run("kill", names);
            std::thread::sleep(Duration::from_millis(500));
            server.run("start", names);
        }
        std::thread::sleep(pause);
        drop(ended);
        writers.into_iter().map(|writer| writer.join().unwrap()).collect::<Vec<_>>()
    });
    let store = host.open();
    let mut count = 0;
    for (machine, epochs) in &acknowledged {
        assert!(!epochs.is_empty(), "nothing was committed to {machine}");
        for (number, memory) in epochs {
            let epoch = store.epoch(&format!("{machine}@{number}").parse().unwrap()).unwrap();
            let mut found = vec![0; memory.len()];
            epoch.stream(b"memory").unwrap().read_at(0, &mut found).unwrap();
            assert!(found == *memory, "{machine}@{number} differs");
            count += 1;
        }
    }
    let verified = store.verify(&mut |_, _| {}).unwrap();
    assert!(verified.is_whole(), "{:?} {:?}", verified.problems, verified.broken_epochs);
    eprintln!("{} kills: {count} acknowledged epochs, all there; {} commits failed", kills.len(), failed.into_inner());
}

#[test]
fn p1_nothing_acknowledged_is_lost_when_servers_are_killed() {
    if !has_ceph("servers are killed") {
        return;
    }
    let server = Arc::new(Server::up("ceph", &["--disks"]));
    let all: &[&str] = &["mon.a", "osd.0", "client.rgw0"];
    torture(&server, &[&["client.rgw0"], &["osd.0"], all], Duration::from_secs(1));
}

#[test]
fn p1_nothing_acknowledged_is_lost_on_three_object_servers() {
    if !is_long() || !has_ceph("three object servers") {
        return;
    }
    let server = Arc::new(Server::up("ceph", &["--disks", "--osds", "3", "--gateways", "2"]));
    let all: &[&str] = &["mon.a", "osd.0", "osd.1", "osd.2", "client.rgw0", "client.rgw1"];
    let each: [&[&str]; 6] = [&["client.rgw0"], &["osd.1"], &["client.rgw1"], &["osd.0", "osd.2"], &["osd.2"], all];
    let kills: Vec<&[&str]> = each.into_iter().cycle().take(18).collect();
    torture(&server, &kills, Duration::from_secs(4));
}
