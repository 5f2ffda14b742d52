//! P1, P2: the real program, killed at random moments.
//!
//! An oracle in a file, synced before the next step, keeps what was acknowledged. After each kill every epoch of the
//! oracle is exported and compared, `verify` must find all whole, and the next commit must work.
//!
//! `scripts/torture` runs it for longer: EPOCHFS_KILLS and EPOCHFS_SECONDS say how long, EPOCHFS_SEED makes it begin
//! with other choices.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use epochfs::platform::clock::Stopwatch;
use epochfs::platform::random::Seeded;
use serde_json::{Value, json};

use crate::must;
use crate::support::image::{PAGE, noise};
use crate::support::program::{Program, run, start};
use crate::support::{Check, Saying};

const MEMORY_PAGES: u64 = 2048;
const SIGKILL: i32 = 9;

/// Streams by name, as the hashes of their bytes.
type Hashes = BTreeMap<String, String>;

/// What was acknowledged.
#[derive(Debug, Default)]
struct Oracle {
    epochs: BTreeMap<(String, u64), Hashes>,
    tags: BTreeMap<(String, String), u64>,
}

impl Oracle {
    fn read(path: &Path) -> Check<Self> {
        let mut oracle = Self::default();
        for line in fs::read_to_string(path).saying("the oracle")?.lines() {
            let fact: Value = serde_json::from_str(line).saying("the oracle")?;
            let text = |name: &str| fact[name].as_str().unwrap_or_default().to_owned();
            let (machine, epoch) = (text("machine"), fact["epoch"].as_u64().unwrap_or(0));
            match text("fact").as_str() {
                "epoch" => {
                    let hashes = serde_json::from_value(fact["streams"].clone()).saying("the oracle")?;
                    oracle.epochs.insert((machine, epoch), hashes);
                }
                "drop" => {
                    oracle.tags.retain(|(of, _), tagged| *of != machine || *tagged != epoch);
                    oracle.epochs.remove(&(machine, epoch));
                }
                "tag" => drop(oracle.tags.insert((machine, text("tag")), epoch)),
                other => return Err(format!("the oracle holds a fact {other:?}")),
            }
        }
        Ok(oracle)
    }

    fn of(&self, machine: &str) -> Vec<u64> {
        self.epochs.keys().filter(|(of, _)| of == machine).map(|(_, epoch)| *epoch).collect()
    }
}

struct Torture {
    directory: tempfile::TempDir,
    program: Program,
    seeded: Seeded,
    /// Bytes of `memory` that changed since the newest epoch.
    dirty: Vec<Range<u64>>,
    attempts: u64,
    clones: u64,
    /// How long each kind of command takes when nobody kills it.
    usual: BTreeMap<&'static str, Duration>,
}

/// A command whose outcome is not known yet, and the fact that it would make.
struct Attempt {
    kind: &'static str,
    arguments: Vec<String>,
    fact: Value,
    /// The message by which a commit is found again.
    message: String,
}

impl Torture {
    fn new(seed: u64) -> Check<Self> {
        let directory = tempfile::tempdir().saying("a temporary directory")?;
        let program = Program::new(directory.path())?;
        let torture = Self {
            program,
            directory,
            seeded: Seeded::new(seed),
            dirty: Vec::new(),
            attempts: 0,
            clones: 0,
            usual: BTreeMap::new(),
        };
        File::create(torture.oracle_path()).saying("the oracle")?;
        let memory = File::create(torture.path("memory")).saying("memory")?;
        memory.set_len(MEMORY_PAGES * PAGE).saying("memory")?;
        fs::write(torture.path("disk0"), b"a small disk").saying("disk0")?;
        torture.expect(&["init"])?;
        Ok(torture)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn oracle_path(&self) -> PathBuf {
        self.path("oracle")
    }

    /// Writes a fact down, durably.
    fn note(&self, fact: &Value) -> Check {
        let mut file = File::options().append(true).open(self.oracle_path()).saying("the oracle")?;
        file.write_all(format!("{fact}\n").as_bytes()).saying("the oracle")?;
        file.sync_all().saying("the oracle")
    }

    /// Runs a command that must succeed.
    fn expect(&self, arguments: &[&str]) -> Check<Value> {
        let output = run(&mut self.program.command(arguments));
        must!(output.status.success(), "epochfs {} failed: {}", arguments.join(" "), describe(&output));
        if output.stdout.is_empty() { Ok(Value::Null) } else { serde_json::from_slice(&output.stdout).saying("json") }
    }

    /// Changes the files as a guest would.
    fn change_files(&mut self) -> Check {
        let memory = File::options().write(true).open(self.path("memory")).saying("memory")?;
        for _ in 0..1 + self.seeded.below(5) {
            let pages = 1 + self.seeded.below(150);
            let start = self.seeded.below(MEMORY_PAGES - pages) * PAGE + self.seeded.below(PAGE);
            let mut bytes = vec![0; (pages * PAGE) as usize - PAGE as usize + 1];
            if !self.seeded.chance(150) {
                noise(&mut self.seeded, &mut bytes);
            }
            memory.write_all_at(&bytes, start).saying("memory")?;
            self.dirty.push(start..start + bytes.len() as u64);
        }
        fs::write(self.path("disk0"), format!("disk after {} attempts", self.attempts)).saying("disk0")
    }

    fn hashes(&self, directory: &Path) -> Check<Hashes> {
        let hash = |name: &str| {
            let bytes = fs::read(directory.join(name)).saying(name)?;
            Ok((name.to_owned(), blake3::hash(&bytes).to_string()))
        };
        ["memory", "disk0"].into_iter().map(hash).collect()
    }

    fn commit(&mut self, newest: Option<u64>) -> Check<Attempt> {
        self.change_files()?;
        self.attempts += 1;
        let message = format!("attempt {}", self.attempts);
        let mut arguments = vec!["commit".to_owned(), "web1".to_owned(), "--message".to_owned(), message.clone()];
        for name in ["memory", "disk0"] {
            arguments.push(format!("{name}={}", self.path(name).display()));
        }
        if let (Some(newest), true) = (newest, self.seeded.chance(500)) {
            let ranges: String =
                self.dirty.iter().map(|range| format!("{} {}\n", range.start, range.end - range.start)).collect();
            fs::write(self.path("dirty"), ranges).saying("dirty")?;
            let dirty = format!("memory={}", self.path("dirty").display());
            arguments.extend(["--dirty".to_owned(), dirty, "--parent".to_owned(), newest.to_string()]);
        }
        let streams = self.hashes(self.directory.path())?;
        let fact = json!({"fact": "epoch", "machine": "web1", "epoch": 0, "streams": streams});
        Ok(Attempt { kind: "commit", arguments, fact, message })
    }

    /// The next command to kill.
    fn attempt(&mut self, oracle: &Oracle) -> Check<Attempt> {
        let epochs = oracle.of("web1");
        let other = |kind: &'static str, arguments: Vec<String>, fact| Attempt {
            kind,
            arguments,
            fact,
            message: String::new(),
        };
        let Some(&some) = epochs.get(self.seeded.below(epochs.len().max(1) as u64) as usize) else {
            return self.commit(None);
        };
        let name = format!("web1@{some}");
        Ok(match self.seeded.below(10) {
            0 => {
                self.clones += 1;
                let to = format!("clone{}", self.clones);
                let streams = &oracle.epochs[&("web1".to_owned(), some)];
                let fact = json!({"fact": "epoch", "machine": to, "epoch": 1, "streams": streams});
                other("clone", vec!["clone".into(), name, to], fact)
            }
            1 => {
                let tag = format!("tag{}", self.seeded.below(3));
                let fact = json!({"fact": "tag", "machine": "web1", "tag": tag, "epoch": some});
                other("tag", vec!["tag".into(), "--force".into(), name, tag], fact)
            }
            2 if epochs.len() > 2 => {
                let fact = json!({"fact": "drop", "machine": "web1", "epoch": epochs[0]});
                other("rm", vec!["rm".into(), "--yes".into(), format!("web1@{}", epochs[0])], fact)
            }
            _ => self.commit(epochs.last().copied())?,
        })
    }

    /// Runs a command, kills it at some moment, and notes what came of it. Tells whether it was killed.
    fn kill(&mut self, mut attempt: Attempt) -> Check<bool> {
        let arguments: Vec<&str> = attempt.arguments.iter().map(String::as_str).collect();
        let usual = self.usual.get(attempt.kind).copied().unwrap_or(Duration::from_millis(20));
        let mut command = self.program.command(&arguments);
        let started = Stopwatch::start();
        let mut child = start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
        // Half of the kills fall near the end, where the outcome is decided.
        let usual_ns = usual.as_nanos() as u64;
        let first = if self.seeded.chance(500) { usual_ns * 3 / 4 } else { 0 };
        let moment = Duration::from_nanos(first + self.seeded.below(usual_ns * 5 / 4 + 1 - first));
        std::thread::sleep(moment.saturating_sub(started.elapsed()));
        let killed = child.kill();
        let output = child.wait_with_output().saying("wait")?;
        killed.saying("kill")?;
        if output.status.success() {
            self.usual.insert(attempt.kind, started.elapsed().max(Duration::from_millis(2)).min(moment));
            let told: Value = serde_json::from_slice(&output.stdout).saying("json")?;
            if attempt.kind == "commit" {
                attempt.fact["epoch"] = told["epoch"].clone();
                self.dirty.clear();
            }
            self.note(&attempt.fact)?;
            return Ok(false);
        }
        must!(output.status.signal() == Some(SIGKILL), "{arguments:?} failed by itself: {}", describe(&output));
        // It took longer than this.
        self.usual.insert(attempt.kind, usual.max(moment + moment / 10));
        self.settle(attempt)?;
        Ok(true)
    }

    /// Looks for what a killed command did after all; half of it would be found by the check.
    fn settle(&mut self, mut attempt: Attempt) -> Check {
        let machine = attempt.fact["machine"].as_str().unwrap_or_default().to_owned();
        let listed = self.epochs(&machine)?;
        let epoch = attempt.fact["epoch"].as_u64();
        let done = match attempt.kind {
            "commit" => match listed.iter().find(|listed| listed["message"] == json!(attempt.message)) {
                Some(found) => {
                    attempt.fact["epoch"] = found["epoch"].clone();
                    self.dirty.clear();
                    true
                }
                None => false,
            },
            "clone" => !listed.is_empty(),
            "rm" => !listed.iter().any(|listed| listed["epoch"].as_u64() == epoch),
            _ => listed.iter().any(|listed| {
                listed["epoch"].as_u64() == epoch
                    && listed["tags"].as_array().is_some_and(|tags| tags.contains(&attempt.fact["tag"]))
            }),
        };
        if done { self.note(&attempt.fact) } else { Ok(()) }
    }

    /// A machine's epochs as `epochfs log` lists them.
    fn epochs(&self, machine: &str) -> Check<Vec<Value>> {
        let output = run(&mut self.program.command(&["log", machine]));
        if output.status.code() == Some(5) {
            return Ok(Vec::new());
        }
        must!(output.status.success(), "epochfs log {machine} failed: {}", describe(&output));
        let document: Value = serde_json::from_slice(&output.stdout).saying("json")?;
        Ok(document["epochs"].as_array().cloned().unwrap_or_default())
    }

    /// Compares the repository with the oracle; `all` exports every epoch, or else the newest few.
    fn check(&mut self, all: bool) -> Check {
        let oracle = Oracle::read(&self.oracle_path())?;
        let machines: BTreeSet<&str> = oracle.epochs.keys().map(|(machine, _)| machine.as_str()).collect();
        let listed = self.expect(&["ls"])?;
        let listed: BTreeSet<&str> =
            listed["machines"].as_array().into_iter().flatten().filter_map(|row| row["machine"].as_str()).collect();
        must!(listed == machines, "the machines are {listed:?} instead of {machines:?}");
        for machine in machines {
            let listed = self.epochs(machine)?;
            let numbers: Vec<u64> = listed.iter().filter_map(|listed| listed["epoch"].as_u64()).collect();
            let expected = oracle.of(machine);
            must!(numbers == expected, "{machine} has the epochs {numbers:?} instead of {expected:?}");
            for ((_, tag), epoch) in oracle.tags.iter().filter(|((of, _), _)| of.as_str() == machine) {
                let shown = self.expect(&["show", &format!("{machine}@{tag}")])?;
                must!(shown["epoch"] == json!(epoch), "{machine}@{tag} is {} instead of {epoch}", shown["epoch"]);
            }
        }
        let skipped = if all { 0 } else { oracle.epochs.len().saturating_sub(12) };
        for ((machine, epoch), hashes) in oracle.epochs.iter().skip(skipped) {
            let target = self.path("export");
            let _ = fs::remove_dir_all(&target);
            self.expect(&["export", &format!("{machine}@{epoch}"), "--output", &target.display().to_string()])?;
            let found = self.hashes(&target)?;
            must!(found == *hashes, "{machine}@{epoch} was acknowledged and is exported wrong");
            fs::remove_dir_all(&target).saying("cleaning up")?;
        }
        let verified = self.expect(&["verify"])?;
        must!(verified["whole"] == json!(true), "verify: {verified}");
        Ok(())
    }

    /// A commit that nobody kills must work, whatever was left behind.
    fn next_commit(&mut self) -> Check {
        let newest = Oracle::read(&self.oracle_path())?.of("web1").last().copied();
        let mut attempt = self.commit(newest)?;
        let started = Stopwatch::start();
        let arguments: Vec<&str> = attempt.arguments.iter().map(String::as_str).collect();
        attempt.fact["epoch"] = self.expect(&arguments)?["epoch"].clone();
        self.usual.insert("commit", started.elapsed());
        self.dirty.clear();
        self.note(&attempt.fact)
    }

    /// Drops old epochs, so that a long run checks about as many each time.
    fn trim(&mut self) -> Check {
        let epochs = Oracle::read(&self.oracle_path())?.of("web1");
        for epoch in epochs.iter().take(epochs.len().saturating_sub(8)) {
            self.expect(&["rm", "--yes", &format!("web1@{epoch}")])?;
            self.note(&json!({"fact": "drop", "machine": "web1", "epoch": epoch}))?;
        }
        Ok(())
    }
}

fn describe(output: &Output) -> String {
    format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr))
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn p1_p2_a_program_killed_at_any_moment_loses_nothing_that_it_acknowledged() {
    let kills = number("EPOCHFS_KILLS").unwrap_or(if crate::support::is_long() { 200 } else { 15 });
    let seconds = number("EPOCHFS_SECONDS").unwrap_or(u64::MAX);
    let seed = number("EPOCHFS_SEED").unwrap_or(1);
    let started = Stopwatch::start();
    let work = || -> Check<(u64, u64, u64)> {
        let mut torture = Torture::new(seed)?;
        torture.next_commit()?;
        let (mut killed, mut survived, mut landed) = (0, 0, 0);
        while killed < kills && survived < kills * 4 + 20 && started.elapsed().as_secs() < seconds {
            let before = Oracle::read(&torture.oracle_path())?;
            let attempt = torture.attempt(&before)?;
            match torture.kill(attempt)? {
                true => {
                    killed += 1;
                    let after = Oracle::read(&torture.oracle_path())?;
                    landed += u64::from(format!("{before:?}") != format!("{after:?}"));
                }
                false => survived += 1,
            }
            let round = format!("seed {seed}, after {killed} kills");
            torture.check(false).saying(&round)?;
            torture.next_commit().saying(&round)?;
            torture.trim().saying(&round)?;
        }
        torture.check(true).saying(format!("seed {seed}, at the end"))?;
        Ok((killed, survived, landed))
    };
    let (killed, survived, landed) = work().unwrap_or_else(|wrong| panic!("{wrong}"));
    let elapsed = started.elapsed();
    eprintln!("{killed} kills ({landed} of them after the effect), {survived} commands were faster, {elapsed:.1?}");
    assert!(killed > 0);
}

/// An epoch that was never made, bytes that were never committed, and a tag that was never given are noticed.
#[test]
fn canary_p1_the_torture_notices_what_is_not_there() {
    let mut torture = Torture::new(1).unwrap();
    torture.next_commit().unwrap();
    torture.check(true).unwrap();
    let honest = fs::read(torture.oracle_path()).unwrap();
    let streams = torture.hashes(torture.directory.path()).unwrap();
    let mut wrong = streams.clone();
    wrong.insert("memory".into(), blake3::hash(b"other").to_string());
    for lie in [
        json!({"fact": "epoch", "machine": "web1", "epoch": 2, "streams": streams}),
        json!({"fact": "epoch", "machine": "web2", "epoch": 1, "streams": streams}),
        json!({"fact": "epoch", "machine": "web1", "epoch": 1, "streams": wrong}),
        json!({"fact": "drop", "machine": "web1", "epoch": 1}),
        json!({"fact": "tag", "machine": "web1", "epoch": 1, "tag": "golden"}),
    ] {
        torture.note(&lie).unwrap();
        assert!(torture.check(true).is_err(), "unnoticed: {lie}");
        fs::write(torture.oracle_path(), &honest).unwrap();
    }
    torture.check(true).unwrap();
}
