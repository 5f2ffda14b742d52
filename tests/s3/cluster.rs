//! P1 and P3 on a small cluster: hosts with networks of their own commit, and take a machine from one another, while links are cut
//! and servers are killed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use epochfs::EpochStore;
use epochfs::platform::random::Seeded;

use crate::asked::seed;
use crate::links::{Hub, Link, Way, has_links};
use crate::server::{Server, has_ceph, is_long, skip};
use crate::world::{Ended, Host, Ran, noise};

const HOSTS: usize = 3;
const MEMORY: usize = 400_000;

/// What was acknowledged: the memory of each epoch of each machine.
type Acknowledged = BTreeMap<(String, u64), Vec<u8>>;

#[derive(Default)]
struct Counts {
    done: AtomicBool,
    failed: AtomicUsize,
    refused: AtomicUsize,
}

impl Counts {
    fn note(&self, ran: &Ran) -> bool {
        match ran.code {
            0 => return true,
            // Another host was quicker.
            4 => self.refused.fetch_add(1, Ordering::SeqCst),
            _ => self.failed.fetch_add(1, Ordering::SeqCst),
        };
        false
    }
}

/// Commits what a machine of its own has on the mount, and a machine that all hosts take from one another.
fn work(host: &Host, number: usize, seed: u64, counts: &Counts) -> Acknowledged {
    let (mut acknowledged, mut seeded) = (Acknowledged::new(), Seeded::new(seed + number as u64));
    let (machine, at) = (format!("m{number}"), host.path("mount"));
    let mut memory = noise(seeded.next(), MEMORY);
    while !counts.done.load(Ordering::SeqCst) {
        let len = if seeded.chance(500) { 50 } else { 200_000 };
        let from = seeded.below((MEMORY - len) as u64) as usize;
        memory[from..from + len].copy_from_slice(&noise(seeded.next(), len));
        let (name, ran) = match seeded.chance(300) {
            true => {
                let file = format!("memory={}", host.file("shared", &memory).display());
                ("shared", host.run(["commit", "shared", &file, "--take-over", "--json"]))
            }
            false => {
                std::fs::write(at.join(&machine).join("live/memory"), &memory).unwrap();
                (machine.as_str(), host.run(["commit", &machine, "--json"]))
            }
        };
        if counts.note(&ran) {
            let epoch = ran.json()["epoch"].as_u64().unwrap();
            let before = acknowledged.insert((name.to_owned(), epoch), memory.clone());
            assert!(before.is_none(), "{name}@{epoch} was acknowledged twice");
        }
    }
    acknowledged
}

/// Cuts links for a while, one after the other and sometimes all, at moments of no plan.
fn cut_links(links: &[&Link], seed: u64, done: &AtomicBool) -> usize {
    let (mut seeded, mut cuts) = (Seeded::new(seed), 0);
    while !done.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(200 + seeded.below(1500)));
        let way = [Way::Requests, Way::Answers, Way::Both, Way::Cable][seeded.below(4) as usize];
        let all = seeded.chance(200);
        let cut: Vec<_> =
            links.iter().filter(|_| all).chain([&links[seeded.below(links.len() as u64) as usize]]).collect();
        cut.iter().for_each(|link| link.cut(way));
        std::thread::sleep(Duration::from_millis(100 + seeded.below(1500)));
        cut.iter().for_each(|link| link.heal());
        cuts += 1;
    }
    cuts
}

/// The epochs that were acknowledged and are not there, or hold something else.
fn lost(store: &EpochStore, acknowledged: &Acknowledged) -> Vec<String> {
    let is_whole = |machine: &str, number: u64, memory: &[u8]| -> epochfs::Result<bool> {
        let epoch = store.epoch(&format!("{machine}@{number}").parse()?)?;
        let mut found = vec![0; memory.len()];
        epoch.stream(b"memory")?.read_at(0, &mut found)?;
        Ok(found == memory)
    };
    let is_lost = |((machine, number), memory): (&(String, u64), &Vec<u8>)| match is_whole(machine, *number, memory) {
        Ok(true) => None,
        Ok(false) => Some(format!("{machine}@{number} differs")),
        Err(error) => Some(format!("{machine}@{number}: {error}")),
    };
    acknowledged.iter().filter_map(is_lost).collect()
}

#[test]
fn p1_hosts_of_a_cluster_lose_nothing_whatever_happens_to_servers_and_links() {
    let test = "hosts of a cluster";
    if !rustix::process::geteuid().is_root() {
        skip(test, "only root mounts here");
        return;
    }
    if !has_ceph(test) || !has_links(test) {
        return;
    }
    let (options, rounds): (&[&str], usize) =
        if is_long() { (&["--disks", "--osds", "3"], 8) } else { (&["--disks"], 1) };
    let server = Arc::new(Server::up("ceph", options));
    let seed = seed();
    let watcher = Host::new(&server);
    let hub = Hub::new(server.endpoint().rsplit("//").next().unwrap().parse().unwrap());
    let hosts: Vec<Host> =
        (0..HOSTS).map(|number| Host::linked(&server, &watcher.url, hub.link(&format!("h{number}")))).collect();
    for (number, host) in hosts.iter().enumerate() {
        let at = host.path("mount");
        std::fs::create_dir(&at).unwrap();
        host.ok(["mount", at.to_str().unwrap(), "--background"]);
        std::fs::create_dir(at.join(format!("m{number}"))).unwrap();
    }
    let counts = Counts::default();
    // In the order in which they start: a gateway needs most of the disks.
    let mut all: Vec<&str> = vec!["mon.a", "osd.0"];
    let mut kills: Vec<Vec<&str>> = vec![vec!["client.rgw0"], vec!["osd.0"]];
    if is_long() {
        all.extend(["osd.1", "osd.2"]);
        kills.extend([vec!["osd.1"], vec!["osd.0", "osd.2"]]);
    }
    all.push("client.rgw0");
    kills.push(all);
    let (acknowledged, cuts) = std::thread::scope(|scope| {
        let counts = &counts;
        let links: Vec<&Link> = hosts.iter().filter_map(|host| host.link.as_ref()).collect();
        let workers: Vec<_> = hosts
            .iter()
            .enumerate()
            .map(|(number, host)| scope.spawn(move || work(host, number, seed, counts)))
            .collect();
        let cutter = scope.spawn(move || cut_links(&links, seed, &counts.done));
        // They end also if something below fails.
        let ended = Ended(&counts.done);
        for names in std::iter::repeat_n(&kills, rounds).flatten() {
            std::thread::sleep(Duration::from_secs(2));
            server.run("kill", names);
            std::thread::sleep(Duration::from_millis(500));
            server.run("start", names);
        }
        std::thread::sleep(Duration::from_secs(3));
        drop(ended);
        let cuts = cutter.join().unwrap();
        let each: Vec<Acknowledged> = workers.into_iter().map(|worker| worker.join().unwrap()).collect();
        (each, cuts)
    });
    for host in &hosts {
        host.ok(["umount", host.path("mount").to_str().unwrap()]);
    }
    let (store, mut together) = (watcher.open(), Acknowledged::new());
    for (epoch, memory) in acknowledged.into_iter().flatten() {
        let before = together.insert(epoch, memory);
        assert!(before.is_none(), "an epoch was acknowledged to two hosts");
    }
    assert_eq!(lost(&store, &together), [""; 0]);
    // What has another byte, or is not there, would be seen.
    let mut wrong = together.clone();
    wrong.first_entry().unwrap().get_mut()[MEMORY / 2] ^= 1;
    wrong.insert(("shared".into(), 1_000_000), Vec::new());
    assert_eq!(lost(&store, &wrong).len(), 2);
    for machine in ["m0", "m1", "m2", "shared"] {
        let count = together.keys().filter(|(name, _)| name == machine).count();
        assert!(count > 0, "nothing was committed to {machine}");
    }
    let verified = store.verify(&mut |_, _| {}).unwrap();
    assert!(verified.is_whole(), "{:?} {:?}", verified.problems, verified.broken_epochs);
    eprintln!(
        "{} kills of servers, {cuts} cuts of links: {} acknowledged epochs, all there; {} commits refused, {} failed",
        kills.len() * rounds,
        together.len(),
        counts.refused.into_inner(),
        counts.failed.into_inner(),
    );
}
