//! `epochfs run`, as its users run it: killed at random moments, and going on from the newest epoch until it is finished.

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use epochfs::platform::clock::Stopwatch;
use epochfs::platform::random::Seeded;
use serde_json::Value;
use tempfile::TempDir;

use crate::fixture::{can_run, is_long, seed};

/// The program under test.
fn binary() -> PathBuf {
    std::env::var_os("EPOCHFS_TEST_BINARY").map_or_else(|| env!("CARGO_BIN_EXE_epochfs").into(), PathBuf::from)
}

struct Host(TempDir);

impl Host {
    fn new() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        assert_eq!(host.run(&["init"]).status.code(), Some(0));
        host
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(words).env("EPOCHFS_REPO", self.0.path().join("repository")).env_remove("EPOCHFS_LOG");
        command.env("EPOCHFS_STATE_DIR", self.0.path().join("state")).stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    #[track_caller]
    fn json(&self, words: &[&str]) -> Value {
        let output = self.run(&[words, &["--json"]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn epochs(&self, machine: &str) -> usize {
        let output = self.run(&["log", machine, "--json"]);
        match serde_json::from_slice::<Value>(&output.stdout) {
            Ok(log) if output.status.success() => log["epochs"].as_array().unwrap().len(),
            _ => 0,
        }
    }
}

/// Ends with the test.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_guest_that_is_killed_again_and_again_counts_to_its_end() {
    const TEST: &str = "a_guest_that_is_killed_again_and_again_counts_to_its_end";
    if !can_run(TEST) {
        return;
    }
    let host = Host::new();
    let mut dice = Seeded::of(seed(), 21);
    let protect = ["--protect", "web1", "--interval", "30ms"];
    let boot = ["run", "--memory", "8M", "--hole", "4M", "--processors", "2", "--count", "60000"];
    let since = Stopwatch::start();
    let mut kills = 0;
    let finished = loop {
        let is_first = host.epochs("web1") == 0;
        let words = if is_first { boot.to_vec() } else { vec!["run", "--from", "web1"] };
        let words = [&words[..], &protect, &["--json", "--quiet"]].concat();
        let mut child = host.command(&words);
        let mut guest = Guest(child.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap());
        let patience = Duration::from_millis(300 + dice.below(1000));
        let started = Stopwatch::start();
        let ended = loop {
            if let Some(status) = guest.0.try_wait().unwrap() {
                break Some(status);
            }
            if started.elapsed() > patience && kills < if is_long() { 60 } else { 6 } {
                break None;
            }
            assert!(since.elapsed() < Duration::from_secs(300), "it makes no progress");
            std::thread::sleep(Duration::from_millis(5));
        };
        match ended {
            None => kills += 1,
            Some(status) => {
                assert!(status.success(), "after {kills} kills: {status:?}");
                let document = guest.0.stdout.take().unwrap();
                break serde_json::from_reader::<_, Value>(document).unwrap();
            }
        }
    };
    assert_eq!(
        (finished["ended"].as_str(), finished["counts"].as_u64()),
        (Some("finished"), Some(120_000)),
        "{finished}"
    );
    eprintln!("{TEST}: {kills} kills, {} epochs", host.epochs("web1"));
    // One that has finished is so still when it is restored.
    let again = host.run(&["run", "--from", "web1", "--time", "60s", "--json", "--quiet"]);
    let again: Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!((again["ended"].as_str(), again["counts"].as_u64()), (Some("finished"), Some(120_000)), "{again}");
    assert!(kills > 0);
    assert_eq!(host.run(&["verify"]).status.code(), Some(0));
}

#[test]
fn a_guest_that_runs_is_not_taken_over_from_its_host() {
    if !can_run("a_guest_that_runs_is_not_taken_over_from_its_host") {
        return;
    }
    let host = Host::new();
    let words = ["run", "--memory", "8M", "--protect", "web1", "--interval", "30ms", "--time", "60s", "--quiet"];
    let mut first = Guest(host.command(&words).stdout(Stdio::null()).spawn().unwrap());
    let has_epochs = |more: usize| {
        let (since, before) = (Stopwatch::start(), host.epochs("web1"));
        while host.epochs("web1") < before + more {
            assert!(since.elapsed() < Duration::from_secs(30), "it makes no epochs");
        }
    };
    has_epochs(2);
    let second = host.run(&["run", "--from", "web1", "--protect", "web1", "--time", "1s", "--quiet"]);
    let said = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(4), "{said}");
    assert!(said.contains("another agent captures web1"), "{said}");
    has_epochs(2);
    assert!(first.0.try_wait().unwrap().is_none(), "the first runs on");
    drop(first);
    host.json(&["run", "--from", "web1", "--protect", "web1", "--time", "200ms"]);
}

#[test]
fn a_guest_goes_on_as_another_machine_from_any_epoch() {
    if !can_run("a_guest_goes_on_as_another_machine_from_any_epoch") {
        return;
    }
    let host = Host::new();
    let made =
        host.json(&["run", "--memory", "8M", "--protect", "web1", "--interval", "50ms", "--time", "600ms", "--audit"]);
    assert!(made["epochs"].as_u64() > Some(2) && made["missed"] == 0 && made["wrong"] == 0, "{made}");
    assert!(made["pause_p50_us"].is_u64() && made["ended"] == "stopped", "{made}");
    let log = host.json(&["log", "web1"]);
    let oldest = log["epochs"].as_array().unwrap().iter().map(|epoch| epoch["epoch"].as_u64().unwrap()).min().unwrap();
    // The oldest epoch has less than what was counted since.
    let from = format!("web1@{oldest}");
    let again = host.json(&["run", "--from", &from, "--time", "50ms"]);
    assert!(again["counts"].as_u64() < made["counts"].as_u64() && again["machine"].is_null(), "{again}");
    let copy = host.json(&["run", "--from", &from, "--protect", "web2", "--interval", "50ms", "--time", "300ms"]);
    assert!(copy["machine"] == "web2" && copy["counts_here"].as_u64() > Some(0), "{copy}");
    // What would lose epochs is refused.
    let refused = host.run(&["run", "--from", &from, "--protect", "web1", "--time", "1s"]);
    assert_eq!(refused.status.code(), Some(4), "{}", String::from_utf8_lossy(&refused.stderr));
    // A fresh guest under a name that has epochs: these stay, and the new ones hold the new guest alone.
    let fresh = host.json(&["run", "--memory", "4M", "--protect", "web1", "--time", "200ms", "--audit"]);
    assert!(fresh["wrong"] == 0 && fresh["counts"].as_u64() < made["counts"].as_u64(), "{fresh}");
}

/// A guest that lacks a page can neither go on nor stop.
#[test]
fn a_guest_whose_memory_is_damaged_ends_and_names_what_is() {
    if !can_run("a_guest_whose_memory_is_damaged_ends_and_names_what_is") {
        return;
    }
    let host = Host::new();
    let load = ["--guest", "load", "--rate", "20000", "--memory", "64M"];
    let made = host.json(&[&["run"][..], &load, &["--protect", "web1", "--interval", "1s", "--time", "3s"]].concat());
    assert!(made["epochs"].as_u64() > Some(1), "{made}");
    let directories = std::fs::read_dir(host.0.path().join("repository/packs")).unwrap();
    let packs = directories.flat_map(|entry| std::fs::read_dir(entry.unwrap().path()).unwrap());
    let largest = packs.map(|pack| pack.unwrap().path()).max_by_key(|pack| pack.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(&largest).unwrap();
    let len = bytes.len();
    bytes[len / 10..len * 6 / 10].iter_mut().step_by(64).for_each(|byte| *byte ^= 1);
    std::fs::write(&largest, bytes).unwrap();
    let since = Stopwatch::start();
    let broken = host.run(&["run", "--from", "web1", "--protect", "web2", "--time", "60s"]);
    let text = String::from_utf8_lossy(&broken.stderr).into_owned();
    assert!(broken.status.code() == Some(3) && since.elapsed() < Duration::from_secs(30), "{broken:?}");
    assert!(text.contains("fails its checksum") && text.contains("epochfs repair"), "{text}");
}

/// What is not stored at the end is not protected.
#[test]
fn a_run_whose_last_epoch_fails_says_so() {
    if !can_run("a_run_whose_last_epoch_fails_says_so") {
        return;
    }
    let host = Host::new();
    let words = ["run", "--memory", "8M", "--protect", "web1", "--interval", "100ms", "--time", "2s"];
    let mut child = host.command(&words);
    let mut guest = Guest(child.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
    let since = Stopwatch::start();
    while host.epochs("web1") == 0 {
        assert!(since.elapsed() < Duration::from_secs(20), "there is no epoch");
    }
    rustix::fs::rename(host.0.path().join("repository"), host.0.path().join("aside")).unwrap();
    let status = guest.0.wait().unwrap();
    let text = std::io::read_to_string(guest.0.stderr.take().unwrap()).unwrap();
    assert!(status.code() == Some(1), "{status:?}: {text}");
    assert!(text.contains("epoch"), "{text}");
}

#[test]
fn a_restored_guest_finds_there_what_earlier_restores_touched() {
    if !can_run("a_restored_guest_finds_there_what_earlier_restores_touched") {
        return;
    }
    let host = Host::new();
    let load = ["--guest", "load", "--rate", "4000", "--hot-share", "99", "--hot-pages", "500"];
    let protect = ["--protect", "web1", "--interval", "2s", "--time", "3s"];
    let made = host.json(&[&["run", "--memory", "64M"][..], &load, &protect].concat());
    assert!(made["epochs"].as_u64() > Some(1), "{made}");
    let restore = ["run", "--from", "web1", "--time", "2s"];
    let alone = host.json(&[&restore[..], &["--no-prefetch"]].concat());
    let touched = alone["pages_brought"].as_u64().unwrap();
    assert!(alone["prefetch"].is_null() && touched > 400, "{alone}");
    // Nothing is known yet but what the latest epochs changed; it leaves a trace.
    let first = host.json(&restore);
    assert_ne!(first["prefetch"]["source"], "trace", "{first}");
    let second = host.json(&restore);
    let prefetch = &second["prefetch"];
    assert_eq!(prefetch["source"], "trace", "{second}");
    assert!(prefetch["pushed_pages"].as_u64() > Some(300), "{second}");
    // It waits for few of them.
    assert!(second["pages_brought"].as_u64().unwrap() < touched / 2, "{second}, and {alone}");
    assert_eq!(host.run(&["verify"]).status.code(), Some(0));
}

#[test]
fn what_is_no_guest_is_refused() {
    if !can_run("what_is_no_guest_is_refused") {
        return;
    }
    let host = Host::new();
    let file = host.0.path().join("file");
    std::fs::write(&file, vec![7; 1 << 20]).unwrap();
    let (memory, state) = (format!("memory={}", file.display()), format!("vmstate={}", file.display()));
    assert_eq!(host.run(&["commit", "web1", &memory]).status.code(), Some(0));
    assert_eq!(host.run(&["run", "--from", "web1"]).status.code(), Some(5));
    assert_eq!(host.run(&["commit", "web1", &memory, &state]).status.code(), Some(0));
    let refused = host.run(&["run", "--from", "web1"]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && text.contains("epochfs restore"), "{text}");
    for words in [
        &["run", "--memory", "3M"][..],
        &["run", "--interval", "1s"],
        &["run", "--processors", "99"],
        &["run", "--hole", "1M"],
    ] {
        let words = [words, &["--time", "10ms"]].concat();
        assert_eq!(host.run(&words).status.code(), Some(2), "{words:?}");
    }
}
