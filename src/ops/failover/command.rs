//! Starting a machine by its operator's command, below a warden.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::warden::WardenOrders;
use crate::error::{Error, Kind, Result};
use crate::platform::process::open_log;

/// The end of a log that is shown when a command failed.
const SHOWN: usize = 600;

/// What was started, with its warden.
pub struct Started {
    warden: Child,
}

impl Started {
    /// Lets it go on by itself. Its warden stays for as long as anything of it does.
    pub fn leave(mut self) {
        let spawned = std::thread::Builder::new().name("warden".into()).spawn(move || {
            // Waited for, so that it leaves no corpse where this process lives for long.
            let _ = self.warden.wait();
        });
        if let Err(error) = spawned {
            tracing::debug!("the warden is not waited for: {error}");
        }
    }

    /// Ends all that was started, and waits until it is gone.
    pub fn end(mut self) -> Result<()> {
        // One that has ended has nothing left below it.
        let _ = kill_process(Pid::from_child(&self.warden), Signal::TERM);
        self.warden.wait().map(|_| ()).map_err(|error| Error::io("cannot wait for what was started", error))
    }
}

/// Starts a command below a warden, and waits until it says, by ending with 0, that the machine runs.
pub fn start(program: &Path, orders: &WardenOrders) -> Result<Started> {
    let told = serde_json::to_string(orders)
        .map_err(|error| Error::usage(format!("what is to be started cannot be told: {error}")))?;
    let mut warden = Command::new(program)
        .args(["failover", "warden", "--orders", &told])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(open_log(&orders.log)?)
        // A terminal's signals are the executor's.
        .process_group(0)
        .spawn()
        .map_err(|error| Error::io(format!("cannot start {}", program.display()), error))?;
    let mut line = String::new();
    if let Some(output) = warden.stdout.take() {
        BufReader::new(output)
            .read_line(&mut line)
            .map_err(|error| Error::io("cannot hear what became of the command", error))?;
    }
    let said: Value = serde_json::from_str(&line).unwrap_or(Value::Null);
    match said["code"].as_i64() {
        Some(0) => Ok(Started { warden }),
        code => {
            let started = Started { warden };
            started.end()?;
            let how = code.map_or("was ended".to_owned(), |code| format!("ended with {code}"));
            Err(Error::new(Kind::Io, format!("{} {how}: {}", orders.command.join(" "), end_of(&orders.log))).hint(
                format!(
                    "its log is {}; mend the command, and repeat this: what was done is not done again",
                    orders.log.display()
                ),
            ))
        }
    }
}

/// Starts something that goes on by itself, and is told of in a log.
pub fn leave_running(command: &mut Command, log: &Path) -> Result<()> {
    let output = open_log(log)?;
    let copied = output.try_clone().map_err(|error| Error::io("cannot duplicate a descriptor", error))?;
    let started = command.stdin(Stdio::null()).stdout(output).stderr(copied).process_group(0).spawn();
    let mut child = started.map_err(|error| Error::io("cannot start the agent", error))?;
    // It is waited for, so that it leaves no corpse where this process lives for long.
    std::thread::Builder::new()
        .name("agent".into())
        .spawn(move || {
            let _ = child.wait();
        })
        .map(|_| ())
        .map_err(|error| Error::io("cannot start a thread", error))
}

fn end_of(log: &PathBuf) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(SHOWN)..]).into_owned();
    let lines: Vec<&str> = text.lines().rev().take(3).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join(" / ")
}
