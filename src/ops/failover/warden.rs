//! The process between an executor and what it starts: whatever a start command leaves running, in whatever session, is this
//! one's descendant, and ends with this host's lease, or when somebody says so.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, wait};
use serde::{Deserialize, Serialize};
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::error::{Error, Result};
use crate::ops::daemon::background;
use crate::platform::clock::{BootClock, Clock};
use crate::platform::lease::{LeaseClaim, watch_claim};
use crate::platform::process::{ProcessSeen, open_log};
use crate::platform::running::Running;

/// What a warden is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WardenOrders {
    /// The lease that all of it runs under; nothing where this host has no leases.
    pub claim: Option<LeaseClaim>,
    /// Where it is told that the machine runs here, and what it is called.
    pub running: (PathBuf, String),
    pub command: Vec<String>,
    /// What the command's environment has beyond this one's.
    pub environment: Vec<(String, String)>,
    /// Where the command's output goes.
    pub log: PathBuf,
    /// Whether it is to reach no network.
    pub is_isolated: bool,
}

/// How long all may take to be gone that were killed, before those are killed that have been started meanwhile.
const KILL_PAUSE: Duration = Duration::from_millis(2);

/// Runs a command; says on standard output how it ended, as one document; and stays until nothing that it left is there.
pub fn warden(orders: &WardenOrders) -> Result<()> {
    let failed = |error: Errno| Error::io("cannot look after what is started", error.into());
    set_child_subreaper(Some(getpid())).map_err(failed)?;
    let log = open_log(&orders.log)?;
    let copied = log.try_clone().map_err(|error| Error::io("cannot duplicate a descriptor", error))?;
    let isolation: &[&str] = if orders.is_isolated { &["unshare", "--net", "--"] } else { &[] };
    let (directory, machine) = &orders.running;
    let _running = Running::hold(directory, machine)?;
    let mut words = isolation.iter().map(|&word| word.to_owned()).chain(orders.command.iter().cloned());
    let program = words.next().ok_or_else(|| Error::usage("no command is given to start the machine"))?;
    if let Some(claim) = orders.claim.clone() {
        let watch = move || {
            let clock: Arc<dyn Clock> = Arc::new(BootClock);
            // It ends with the process.
            watch_claim(claim, &clock, &|| false, &|| end_all("this host's lease is over"))
        };
        spawn("lease-watch", move || {
            if let Err(error) = watch() {
                tracing::error!("the lease is not watched: {error}");
                end_all("nobody watches the lease");
            }
        })?;
    }
    let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(|error| Error::io("cannot handle signals", error))?;
    spawn("signals", move || signals.forever().for_each(|_| end_all("told to end")))?;
    // Only now: nothing is started that nobody would end.
    let child = Command::new(&program)
        .args(words)
        .envs(orders.environment.iter().cloned())
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(copied)
        .spawn()
        .map_err(|error| Error::io(format!("cannot start {program}"), error))?;
    let command = Pid::from_child(&child);
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == command => {
                let code =
                    status.exit_status().unwrap_or_else(|| 128 + status.terminating_signal().unwrap_or_default());
                say(&json!({"code": code}));
            }
            Ok(_) | Err(Errno::INTR) => {}
            // Nothing is left.
            Err(_) => return Ok(()),
        }
    }
}

/// Whoever started this may be gone.
fn say(document: &serde_json::Value) {
    let mut output = std::io::stdout();
    let said = output.write_all(format!("{document}\n").as_bytes()).and_then(|()| output.flush());
    if let Err(error) = said.map_err(|error| Error::io("standard output", error)).and_then(|()| background::let_go()) {
        tracing::warn!("nobody hears how the command ended: {error}");
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let spawned = std::thread::Builder::new().name(name.into()).spawn(work);
    spawned.map(|_| ()).map_err(|error| Error::io("cannot start a thread", error))
}

/// Ends all descendants, and those that they leave, until there is none.
fn end_all(why: &str) {
    loop {
        let all = descendants();
        if all.is_empty() {
            tracing::error!("{why}: nothing of it runs any more");
            return;
        }
        for pid in all {
            // One that has just ended needs none; its number is not another's before this process has taken note of it, or
            // its parent, which is being ended too.
            let _ = kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(KILL_PAUSE);
    }
}

/// All processes below this one that run.
fn descendants() -> Vec<Pid> {
    let mut children: std::collections::BTreeMap<i32, Vec<i32>> = std::collections::BTreeMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        if let Ok(seen) = ProcessSeen::of(pid)
            && !seen.has_ended
        {
            children.entry(seen.parent).or_default().push(pid);
        }
    }
    let mut found = Vec::new();
    let mut below = vec![getpid().as_raw_nonzero().get()];
    while let Some(parent) = below.pop() {
        for child in children.remove(&parent).unwrap_or_default() {
            found.extend(Pid::from_raw(child));
            below.push(child);
        }
    }
    found
}
