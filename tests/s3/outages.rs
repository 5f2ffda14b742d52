//! The link to the service is cut while machines are in use: commits wait and come in their order, reads end in time, and
//! nothing needs an operator.

use std::thread::JoinHandle;
use std::time::Duration;

use epochfs::Kind;
use epochfs::ops::control::{Client, CommitRequest};
use epochfs::platform::clock::Stopwatch;

use crate::proxy::{Fault, Proxy, Rule};
use crate::server::{ceph, skip};
use crate::world::{Host, noise, ran};

/// A mount by way of a proxy.
struct Mounted {
    host: Host,
    proxy: Proxy,
    at: String,
}

impl Mounted {
    fn new(test: &str) -> Option<Self> {
        Self::with_patience(test, 3)
    }

    fn with_patience(test: &str, seconds: u32) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skip(test, "only root mounts here");
            return None;
        }
        let server = ceph(test)?;
        let host = Host::new(&server);
        let proxy = Proxy::new(server.endpoint());
        let mut through = Host::at(&server, &host.url, &proxy.url());
        through.patience_s = seconds;
        let at = through.path("mount");
        std::fs::create_dir(&at).unwrap();
        let at = at.to_str().unwrap().to_owned();
        through.ok(["mount", &at, "--background"]);
        std::fs::create_dir(format!("{at}/web1")).unwrap();
        Some(Self { host: through, proxy, at })
    }

    fn write(&self, bytes: &[u8]) {
        std::fs::write(format!("{}/web1/live/memory", self.at), bytes).unwrap();
    }

    /// Begins to commit what was written, by way of the daemon's socket, which needs no store to find.
    fn begin_commit(&self, tag: &str) -> JoinHandle<Result<(), String>> {
        let mut command = self.host.command(["commit", "web1", "--tag", tag, "--json"]);
        std::thread::spawn(move || {
            let ran = ran(command.output().unwrap());
            if ran.code == 0 { Ok(()) } else { Err(ran.err) }
        })
    }

    fn status(&self) -> serde_json::Value {
        let mut command = self.host.command(["status", "--json"]);
        ran(command.output().unwrap()).json()["daemons"][0].clone()
    }

    fn wait_for(&self, what: &str, holds: impl Fn(&serde_json::Value) -> bool) {
        let since = Stopwatch::start();
        while !holds(&self.status()) {
            assert!(since.elapsed() < Duration::from_secs(20), "{what}: {:#}", self.status());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn commits_wait_for_a_store_that_is_away_and_come_in_their_order() {
    let Some(mounted) = Mounted::new("commits while the store is away") else { return };
    let (first, second, third) = (noise(31, 300_000), noise(32, 300_000), noise(33, 300_000));
    mounted.write(&first);
    mounted.host.ok(["commit", "web1", "--tag", "before"]);
    // It is on its way for a moment after it was told to be durable.
    mounted.wait_for("no commit waits", |status| status["machines"][0]["commits_in_flight"] == 0);
    // The daemon is told by way of its socket; who asks must not need the store himself.
    mounted.proxy.set_down(true);
    mounted.write(&second);
    let commit_second = mounted.begin_commit("second");
    mounted.wait_for("a commit waits", |status| status["machines"][0]["commits_in_flight"] == 1);
    mounted.write(&third);
    let commit_third = mounted.begin_commit("third");
    mounted.wait_for("two commits wait", |status| status["machines"][0]["commits_in_flight"] == 2);
    mounted.wait_for("status says so", |status| {
        let why = status["machines"][0]["error"].as_str().unwrap_or_default();
        status["store"]["unreachable_since_ns"].is_u64() && why.contains("waits for the store")
    });
    // Live goes on, and what needs the store ends in time.
    assert!(std::fs::read(format!("{}/web1/live/memory", mounted.at)).unwrap() == third);
    let since = Stopwatch::start();
    let error = std::fs::read(format!("{}/web1/epochs/before/memory", mounted.at)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5), "{error}");
    assert!(since.elapsed() < Duration::from_secs(15), "{:?}", since.elapsed());
    mounted.proxy.set_down(false);
    commit_second.join().unwrap().unwrap();
    commit_third.join().unwrap().unwrap();
    mounted.wait_for("it is over", |status| status["store"]["unreachable_since_ns"].is_null());
    let other = mounted.host.another();
    for (epoch, expected) in [("before", &first), ("second", &second), ("third", &third), ("latest", &third)] {
        let is = other.memory(&format!("web1@{epoch}"));
        let differs: Vec<usize> = is
            .chunks(4096)
            .zip(expected.chunks(4096))
            .enumerate()
            .filter(|(_, (a, b))| a != b)
            .map(|(at, _)| at)
            .collect();
        assert!(differs.is_empty() && is.len() == expected.len(), "{epoch}: pages {differs:?} of {} bytes", is.len());
    }
    assert_eq!(other.ok(["log", "web1", "--json"]).json()["epochs"].as_array().unwrap().len(), 3);
    mounted.host.ok(["umount", &mounted.at]);
    other.ok(["verify"]);
}

/// A machine stands still for its capture: it must not until the store is there again.
#[test]
fn no_capture_waits_behind_others_for_a_store_that_is_away() {
    let Some(mounted) = Mounted::new("captures while the store is away") else { return };
    mounted.write(&noise(41, 100_000));
    mounted.host.ok(["commit", "web1", "--tag", "before"]);
    let socket = mounted.status()["socket"].as_str().unwrap().to_owned();
    let capture = |socket: &str| {
        let request = CommitRequest { machine: "web1".into(), is_capture: true, ..CommitRequest::default() };
        Client::connect(socket.as_ref()).unwrap().unwrap().commit(request, &mut |_| true)
    };
    mounted.proxy.set_down(true);
    let mut waiting = Vec::new();
    let refused = loop {
        let count = waiting.len();
        mounted.write(&noise(42 + count as u64, 100_000));
        let (sender, result) = std::sync::mpsc::channel();
        let socket = socket.clone();
        std::thread::spawn(move || sender.send(capture(&socket)).unwrap());
        match result.recv_timeout(Duration::from_millis(700)) {
            Ok(refused) => break refused.unwrap_err(),
            Err(_) => waiting.push(result),
        }
        assert!(waiting.len() < 20, "nothing is refused");
    };
    assert!(refused.kind() == Kind::Unavailable && refused.to_string().contains("wait for the store"), "{refused}");
    assert!(!waiting.is_empty(), "{refused}");
    mounted.proxy.set_down(false);
    let epochs: Vec<u64> =
        waiting.iter().map(|result| result.recv_timeout(Duration::from_secs(30)).unwrap().unwrap().epoch).collect();
    assert!(epochs.is_sorted_by(|a, b| a < b), "{epochs:?}");
    let newest = mounted.host.another().memory(&format!("web1@{}", epochs[epochs.len() - 1]));
    assert!(newest == noise(41 + epochs.len() as u64, 100_000));
    mounted.host.ok(["umount", &mounted.at]);
}

/// The answer to a record's put is lost, and the store is away before it can be asked again: the epoch is there once.
#[test]
fn p2_a_record_that_arrived_before_the_link_was_cut_is_one_epoch() {
    let Some(mounted) = Mounted::new("a record before the link is cut") else { return };
    mounted.write(&noise(34, 50_000));
    mounted.host.ok(["commit", "web1", "--tag", "before"]);
    let wanted = noise(35, 50_000);
    mounted.write(&wanted);
    mounted.proxy.add(Rule::new("PUT", "/log/", 1, Fault::LostThenDown));
    let commit = mounted.begin_commit("after");
    mounted.wait_for("the commit waits", |status| status["store"]["unreachable_since_ns"].is_u64());
    std::thread::sleep(Duration::from_secs(9));
    mounted.proxy.set_down(false);
    commit.join().unwrap().unwrap();
    let other = mounted.host.another();
    assert!(other.memory("web1@after") == wanted);
    assert_eq!(other.ok(["log", "web1", "--json"]).json()["epochs"].as_array().unwrap().len(), 2);
    mounted.host.ok(["umount", &mounted.at]);
}

#[test]
fn p6_what_waits_when_the_mount_ends_is_there_with_the_next_one() {
    let Some(mounted) = Mounted::with_patience("an unmount while the store is away", 60) else { return };
    mounted.write(&noise(36, 200_000));
    mounted.host.ok(["commit", "web1", "--tag", "before"]);
    mounted.wait_for("no commit waits", |status| status["machines"][0]["commits_in_flight"] == 0);
    let wanted = noise(37, 200_000);
    mounted.write(&wanted);
    mounted.proxy.set_down(true);
    let commit = mounted.begin_commit("waits");
    mounted.wait_for("the commit waits", |status| status["machines"][0]["commits_in_flight"] == 1);
    let since = Stopwatch::start();
    let unmounted = mounted.host.ok(["umount", &mounted.at]);
    assert!(unmounted.err.contains("no epoch holds what was changed of web1"), "{}", unmounted.err);
    // And not as long as a store is waited for otherwise.
    assert!(since.elapsed() < Duration::from_secs(30), "{:?}", since.elapsed());
    let error = commit.join().unwrap().unwrap_err();
    assert!(error.contains("the mount ended before this epoch of web1 could be stored"), "{error}");
    mounted.proxy.set_down(false);
    mounted.host.ok(["mount", &mounted.at, "--background"]);
    assert!(std::fs::read(format!("{}/web1/live/memory", mounted.at)).unwrap() == wanted);
    mounted.host.ok(["commit", "web1"]);
    assert!(mounted.host.another().memory("web1") == wanted);
    let unmounted = mounted.host.ok(["umount", &mounted.at]);
    assert!(!unmounted.err.contains("no epoch holds"), "{}", unmounted.err);
}
