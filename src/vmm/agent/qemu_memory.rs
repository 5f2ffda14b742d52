//! Where the memory of a QEMU's machine is: in files of its live, in place; or its own, and then all of it goes into the file
//! of the state, at places that stay the same ("mapped-ram"). That is begun while the machine runs: what it writes meanwhile
//! goes there again, in rounds, and at last with the machine stopped.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::super::qmp::{Monitor, file_channel};
use super::elsewhere::Written;
use super::stopped::others_stopped;
use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;

/// Where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryPlace {
    InLive,
    /// These backends are elsewhere.
    Own(Vec<String>),
}

impl MemoryPlace {
    pub fn find(monitor: &mut Monitor<'_>, live: &Path) -> Result<Self> {
        let backends = monitor.run("query-memdev", Value::Null)?;
        let process = monitor.peer().ok().map(|peer| peer.pid());
        let mut own = Vec::new();
        let backends = backends.as_array().map(Vec::as_slice).unwrap_or_default();
        for backend in backends {
            let id = backend["id"].as_str().unwrap_or_default();
            let of = json!({"path": format!("/objects/{id}"), "property": "mem-path"});
            let path = monitor.run("qom-get", of).unwrap_or(Value::Null);
            let is_there = match path.as_str().map(|path| Written::new(id, path)) {
                Some(file) => file.is_in_live(process, live)? && file.is_opened(process),
                None => false,
            };
            if !is_there || backend["share"] != true {
                own.push(id.to_owned());
            }
        }
        Ok(if own.is_empty() && !backends.is_empty() { Self::InLive } else { Self::Own(own) })
    }
}

/// Threads that write pages: with one, each page is a write of its own.
const CHANNELS: u32 = 2;

/// The machine is stopped when what is left takes no longer than this, as far as QEMU can tell.
const PAUSE_WANTED_MS: u32 = 5;

/// So many rounds are made at most, and another one only while each has less to do than this part of the one before.
const ROUNDS_MAX: u64 = 12;
const SHRINKS: f64 = 0.8;

/// How long memory may be saved while the machine runs, and after it was stopped.
const RUNNING_WAIT: Duration = Duration::from_secs(600);
const STOPPED_WAIT: Duration = Duration::from_secs(30);

const NAP: Duration = Duration::from_millis(1);

/// How often it is said that this still goes on.
const HEED_INTERVAL: Duration = Duration::from_secs(5);

/// What the next migrations do: leave out memory that is in files others see, or save all of it in its place. What they did before
/// is kept: whoever migrates the machine otherwise counts on it.
pub struct Choice {
    capabilities: Vec<(&'static str, bool)>,
    parameters: Option<Value>,
}

const CAPABILITIES: [&str; 3] = ["x-ignore-shared", "mapped-ram", "multifd"];

/// What migrations of memory that is QEMU's own are told besides, and what QEMU begins with.
const BANDWIDTH: (&str, u64) = ("max-bandwidth", 128 << 20);
const DOWNTIME: (&str, u64) = ("downtime-limit", 300);
const THREADS: (&str, u64) = ("multifd-channels", 2);

/// The capabilities that this QEMU has, of those that are chosen, and whether they are on.
fn known(monitor: &mut Monitor<'_>) -> Result<Vec<(&'static str, bool)>> {
    let answer = monitor.run("query-migrate-capabilities", Value::Null)?;
    let all = answer.as_array().map(Vec::as_slice).unwrap_or_default();
    let of = |name: &'static str| {
        all.iter().find(|known| known["capability"] == name).map(|known| (name, known["state"] == true))
    };
    Ok(CAPABILITIES.into_iter().filter_map(of).collect())
}

fn set(monitor: &mut Monitor<'_>, known: &[(&'static str, bool)], wanted: &[(&'static str, bool)]) -> Result<()> {
    // What is to be off first: some exclude each other.
    for state in [false, true] {
        let changes: Vec<Value> = wanted
            .iter()
            .filter(|change| {
                change.1 == state && !known.contains(change) && (state || known.contains(&(change.0, true)))
            })
            .map(|(name, state)| json!({"capability": name, "state": state}))
            .collect();
        if !changes.is_empty() {
            monitor.run("migrate-set-capabilities", json!({"capabilities": changes}))?;
        }
    }
    Ok(())
}

impl Choice {
    /// Whether this QEMU can save memory that is there.
    pub fn check(monitor: &mut Monitor<'_>, place: &MemoryPlace, live: &Path) -> Result<()> {
        let can_save = known(monitor)?.iter().any(|(name, _)| *name == "mapped-ram");
        if can_save || *place == MemoryPlace::InLive {
            return Ok(());
        }
        Err(Error::usage(format!(
            "the memory is no shared file in {}, and this QEMU cannot save it with each page in its place",
            live.display()
        ))
        .hint(format!(
            "use QEMU 9.0 or newer; or start it with -machine memory-backend=ram -object \
             memory-backend-file,id=ram,size=SIZE,share=on,mem-path={}",
            live.join("memory").display()
        )))
    }

    /// For a machine whose memory is there; nothing is changed yet.
    pub fn new(monitor: &mut Monitor<'_>, place: &MemoryPlace, live: &Path) -> Result<Self> {
        Self::check(monitor, place, live)?;
        let capabilities = known(monitor)?;
        let mut parameters = None;
        if matches!(place, MemoryPlace::Own(_)) {
            let before = monitor.run("query-migrate-parameters", Value::Null)?;
            let kept = |(name, usual): (&str, u64)| (name.to_owned(), json!(before[name].as_u64().unwrap_or(usual)));
            parameters = Some(Value::Object([BANDWIDTH, DOWNTIME, THREADS].map(kept).into_iter().collect()));
        }
        Ok(Self { capabilities, parameters })
    }

    pub fn make(&self, monitor: &mut Monitor<'_>) -> Result<()> {
        let is_own = self.parameters.is_some();
        let wanted = [("x-ignore-shared", !is_own), ("mapped-ram", is_own), ("multifd", is_own)];
        set(monitor, &self.capabilities, &wanted)?;
        if is_own {
            let own = json!({BANDWIDTH.0: 0, DOWNTIME.0: PAUSE_WANTED_MS, THREADS.0: CHANNELS});
            monitor.run("migrate-set-parameters", own)?;
        }
        Ok(())
    }

    /// Has migrations do again what they did.
    pub fn undo(&self, monitor: &mut Monitor<'_>) -> Result<()> {
        let now = known(monitor)?;
        set(monitor, &now, &self.capabilities)?;
        let parameters = self.parameters.clone();
        parameters.map_or(Ok(()), |parameters| monitor.run("migrate-set-parameters", parameters).map(|_| ()))
    }

    /// The same where it is not known any more: they do what they do in a QEMU that was just started.
    pub fn forget(monitor: &mut Monitor<'_>) -> Result<()> {
        let capabilities = known(monitor)?;
        let is_own = capabilities.contains(&("mapped-ram", true));
        let usual = [BANDWIDTH, DOWNTIME, THREADS].map(|(name, usual)| (name.to_owned(), json!(usual)));
        let parameters = is_own.then(|| Value::Object(usual.into_iter().collect()));
        Self { capabilities: capabilities.into_iter().map(|(name, _)| (name, false)).collect(), parameters }
            .undo(monitor)
    }
}

/// A machine whose memory and state are saved.
pub struct Saved {
    /// Since when it stands still, at the most, and how often its memory was gone through.
    pub stopped: (Stopwatch, u32),
    /// What the migration is known by that did it.
    pub migration: String,
}

/// Saves memory and state of a machine that runs, and returns when it is stopped and all is saved: since when it stands still, at
/// the most. `heed` is called while this goes on. If this fails, `has_stopped` says whether the machine may have been stopped by it,
/// or will yet be; else it is said what the migration is known by that saved it.
pub fn save_whole(
    monitor: &mut Monitor<'_>,
    path: &Path,
    heed: &mut dyn FnMut() -> Result<()>,
    has_stopped: &mut bool,
) -> Result<Saved> {
    // QEMU opens the file once more for each of its threads, and does not survive that this fails: so it is given an open one.
    let failed = |error| Error::io(format!("cannot open {} to save the memory there", path.display()), error);
    let file = File::options().write(true).create(true).truncate(false).mode(0o600).open(path).map_err(failed)?;
    let set = monitor.give(&file)?;
    let begun = monitor.run("migrate", file_channel(Path::new(&format!("/dev/fdset/{set}")))?);
    *has_stopped = monitor.has_begun_to_save();
    let saved = begun.and_then(|_| follow(monitor, heed, has_stopped));
    if saved.is_err() && monitor.has_begun_to_save() {
        // It runs, or whoever lets it go on waits for the end of this.
        let _ = monitor.run("migrate_cancel", Value::Null);
    }
    // One that stays is closed with the connection.
    let _ = monitor.run("remove-fd", json!({"fdset-id": set}));
    let of = |file: std::fs::Metadata| (file.dev(), file.ino());
    match (saved, file.metadata().map(of), std::fs::metadata(path).map(of)) {
        (Ok(_), Ok(saved), named) if named.as_ref().ok() != Some(&saved) => {
            Err(Error::conflict(format!("{} was removed or replaced while the memory was saved there", path.display()))
                .hint("nothing else may write to it while the machine is protected"))
        }
        (saved, ..) => saved,
    }
}

fn follow(monitor: &mut Monitor<'_>, heed: &mut dyn FnMut() -> Result<()>, has_stopped: &mut bool) -> Result<Saved> {
    // QEMU itself stops it otherwise; if it is reset then, it has the status of one that never ran.
    let mut others = |status: &str, event: Option<&str>| match (status, event) {
        ("running" | "finish-migrate" | "postmigrate" | "prelaunch", None) => Ok(()),
        (status, event) => {
            *has_stopped = false;
            Err(others_stopped(event.unwrap_or(status)))
        }
    };
    let begun = Stopwatch::start();
    let (mut stopped, mut heeded) = (Stopwatch::start(), Stopwatch::start());
    let mut is_running = true;
    let mut rounds = Rounds::default();
    loop {
        if is_running {
            // It runs when the question is asked, if the answer is that it runs.
            let asked = Stopwatch::start();
            let answer = monitor.run("query-status", Value::Null)?;
            let status = answer["status"].as_str().unwrap_or("unknown");
            others(status, monitor.stopped_by())?;
            is_running = status == "running";
            if is_running {
                stopped = asked;
            }
        }
        let migration = monitor.run("query-migrate", Value::Null)?;
        match migration["status"].as_str() {
            Some("completed") => {
                // Unseen until now, it may have stopped by itself before.
                others("postmigrate", monitor.stopped_by())?;
                return Ok(Saved { stopped: (stopped, rounds.count()), migration: migration.to_string() });
            }
            Some(status @ ("failed" | "cancelled")) => {
                let why = migration["error-desc"].as_str().unwrap_or("QEMU gives no reason");
                return Err(Error::new(Kind::Io, format!("the memory could not be saved: migration {status}: {why}")));
            }
            _ => {}
        }
        let is_over = rounds.see(&migration["ram"]);
        if is_running && (is_over || begun.elapsed() > RUNNING_WAIT) {
            stopped = Stopwatch::start();
            let before = monitor.stop()?;
            others(&before, monitor.stopped_by())?;
            is_running = false;
        }
        if !is_running && stopped.elapsed() > STOPPED_WAIT {
            return Err(Error::new(
                Kind::Io,
                format!("QEMU did not save the rest of the memory within {} s", STOPPED_WAIT.as_secs()),
            ));
        }
        if heeded.elapsed() > HEED_INTERVAL {
            heed()?;
            heeded = Stopwatch::start();
        }
        std::thread::sleep(NAP);
    }
}

/// The rounds of a migration, as far as they were seen.
#[derive(Default)]
struct Rounds {
    number: u64,
    /// The most that was seen to be left in this round, and in the one before.
    left: f64,
    before: Option<f64>,
}

impl Rounds {
    fn count(&self) -> u32 {
        u32::try_from(self.number).unwrap_or(u32::MAX).max(1)
    }

    /// Whether another round would not have less to do.
    fn see(&mut self, ram: &Value) -> bool {
        let (Some(number), Some(left)) = (ram["dirty-sync-count"].as_u64(), ram["remaining"].as_f64()) else {
            return false;
        };
        if number == self.number {
            self.left = self.left.max(left);
            return false;
        }
        // What was asked about too late says nothing.
        let before = self.before.replace(self.left).filter(|_| number > 3);
        let is_less = before.is_none_or(|before| before <= 0.0 || self.left < before * SHRINKS);
        (self.number, self.left) = (number, left);
        !is_less || number > ROUNDS_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_go_on_while_they_shrink() {
        let seen = |rounds: &mut Rounds, number: u64, left: u64| {
            rounds.see(&json!({"dirty-sync-count": number, "remaining": left}))
        };
        let mut rounds = Rounds::default();
        assert!(!rounds.see(&Value::Null));
        for (number, left) in [(1, 1000), (1, 500), (2, 300), (2, 10), (3, 100), (4, 30), (5, 20), (6, 0)] {
            assert!(!seen(&mut rounds, number, left), "{number} {left}");
        }
        let mut rounds = Rounds::default();
        let ends = |left: &[u64]| {
            let mut rounds = Rounds::default();
            (1..).zip(left).position(|(number, left)| seen(&mut rounds, number, *left)).map(|at| at + 1)
        };
        assert_eq!(ends(&[1000, 300, 290, 290, 290, 290]), Some(4));
        assert_eq!(ends(&[1000, 300, 200, 100, 60, 40, 30]), None);
        assert!(!seen(&mut rounds, 12, 1000), "it is not known what was before");
        assert!(seen(&mut rounds, 13, 10));
    }
}
