//! A stand-in for QEMU's monitor, which keeps account of whether its machine runs.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use std::time::Duration;

use epochfs::error::Kind;
use epochfs::platform::clock::Stopwatch;
use epochfs::vmm::agent::MachineAgent;
use serde_json::{Value, json};

/// An agent that has ended may have its lock for another moment: a process that another test starts has it, too, until it is
/// another program.
pub fn try_until_free(mut new: impl FnMut() -> epochfs::Result<MachineAgent>) -> epochfs::Result<MachineAgent> {
    let since = Stopwatch::start();
    loop {
        match new() {
            Err(error) if error.kind() == Kind::Conflict && since.elapsed() < Duration::from_secs(5) => {
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// What it does instead of answering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Refuse,
    Close,
    /// Does what it was told, and closes the connection before it says so.
    CloseAfter,
    /// Does what it was told, and answers when nobody waits for it any more.
    Late,
}

#[derive(Debug)]
pub struct Machine {
    pub status: &'static str,
    /// What it was told, in order, without the questions.
    pub told: Vec<String>,
    /// The command that goes wrong next, and how; it does so once.
    pub fault: Option<(&'static str, Fault)>,
    pub memory: PathBuf,
    /// The disks that it writes to.
    pub disks: Vec<(&'static str, PathBuf)>,
    /// The file that it is given open to save its memory to.
    pub state: PathBuf,
    pub fails_to_save: bool,
    /// It is asked so often before the state that it saves just now is there; then it is stopped, whatever it was told meanwhile.
    pub saves_for: u32,
    /// Somebody else stops it in this round of saving its memory.
    pub stopped_in_round: u64,
    /// It writes so much that saving its memory while it runs never ends.
    pub never_converges: bool,
    /// What its migrations do: whether the next state has all of the memory in it, and is begun while the machine runs.
    pub capabilities: BTreeMap<String, bool>,
    pub parameters: Value,
    /// What it tells before it answers next.
    pub events: Vec<&'static str>,
    /// How many states it has saved: by this they are told apart.
    pub migrations: u64,
    /// It shuts down in this round of saving its memory, and stays.
    pub shuts_down_in_round: u64,
    rounds: u64,
    saved: bool,
}

pub struct FakeMonitor {
    pub path: PathBuf,
    pub machine: Arc<Mutex<Machine>>,
}

impl FakeMonitor {
    pub fn start(directory: &Path, memory: &Path) -> Self {
        let path = directory.join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let machine = Machine {
            status: "running",
            told: Vec::new(),
            fault: None,
            memory: memory.to_owned(),
            disks: Vec::new(),
            state: memory.with_file_name("vmstate"),
            fails_to_save: false,
            saves_for: 0,
            stopped_in_round: 0,
            never_converges: false,
            capabilities: ["x-ignore-shared", "mapped-ram", "multifd"].map(|name| (name.to_owned(), false)).into(),
            parameters: json!({"max-bandwidth": 1 << 30, "downtime-limit": 300, "multifd-channels": 2}),
            events: Vec::new(),
            migrations: 0,
            shuts_down_in_round: 0,
            rounds: 0,
            saved: false,
        };
        let machine = Arc::new(Mutex::new(machine));
        let of_thread = machine.clone();
        // One client after the other, like QEMU.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = serve(&stream.unwrap(), &of_thread);
            }
        });
        Self { path, machine }
    }

    pub fn machine(&self) -> std::sync::MutexGuard<'_, Machine> {
        self.machine.lock().unwrap()
    }
}

fn serve(mut stream: &UnixStream, machine: &Mutex<Machine>) -> std::io::Result<()> {
    stream.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n")?;
    for line in BufReader::new(stream).lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let command = request["execute"].as_str().unwrap().to_owned();
        let mut machine = machine.lock().unwrap();
        let fault = match machine.fault {
            Some((name, fault)) if name == command => {
                machine.fault = None;
                Some(fault)
            }
            _ => None,
        };
        let answer = match fault {
            Some(Fault::Close) => return Ok(()),
            Some(Fault::Refuse) => json!({"error": {"class": "GenericError", "desc": "it was told to fail"}}),
            fault => {
                let answer = machine.obey(&command, &request["arguments"]);
                if fault == Some(Fault::CloseAfter) {
                    return Ok(());
                }
                json!({"return": answer})
            }
        };
        let events = std::mem::take(&mut machine.events);
        drop(machine);
        if fault == Some(Fault::Late) {
            std::thread::sleep(Duration::from_millis(3500));
        }
        for event in events {
            stream.write_all(format!("{{\"event\": \"{event}\"}}\r\n").as_bytes())?;
        }
        stream.write_all(format!("{answer}\r\n").as_bytes())?;
    }
    Ok(())
}

impl Machine {
    fn obey(&mut self, command: &str, arguments: &Value) -> Value {
        if !command.starts_with("query-") && !command.starts_with("qom-") && command != "qmp_capabilities" {
            self.told.push(command.to_owned());
        }
        match command {
            "query-migrate-capabilities" => {
                let all = self.capabilities.iter();
                all.map(|(name, state)| json!({"capability": name, "state": state})).collect()
            }
            "add-fd" => json!({"fdset-id": 7}),
            "migrate-set-capabilities" => {
                for one in arguments["capabilities"].as_array().unwrap() {
                    self.capabilities.insert(one["capability"].as_str().unwrap().into(), one["state"] == true);
                }
                json!({})
            }
            "query-migrate-parameters" => self.parameters.clone(),
            "migrate-set-parameters" => {
                for (name, value) in arguments.as_object().unwrap() {
                    self.parameters[name] = value.clone();
                }
                json!({})
            }
            "query-memdev" => json!([{"id": "ram", "share": true}]),
            "qom-get" => json!(self.memory),
            "query-block" => {
                let drive = |(device, file): &(&str, PathBuf)| json!({"device": device, "qdev": "/machine/peripheral/disk", "inserted": {"file": file, "ro": false}});
                let mut drives: Vec<Value> = self.disks.iter().map(drive).collect();
                drives.push(json!({"device": "ide1-cd0", "qdev": "/machine/unattached/device[4]"}));
                drives.push(json!({"device": "rom", "inserted": {"file": "/nonexistent/rom", "ro": true}}));
                json!(drives)
            }
            "query-status" => json!({"status": self.status}),
            "stop" => {
                // What stands still stands still as it does.
                if self.status == "running" {
                    self.status = "paused";
                    self.events.push("STOP");
                }
                json!({})
            }
            "migrate_cancel" => {
                (self.saves_for, self.rounds) = (0, 0);
                json!({})
            }
            "migrate" if self.capabilities["mapped-ram"] => {
                assert_eq!((self.status, self.saved), ("running", false), "all of the memory is saved while it runs");
                assert_eq!(arguments["channels"][0]["addr"]["filename"], "/dev/fdset/7");
                std::fs::write(&self.state, b"all of its memory, and the state of its devices").unwrap();
                self.rounds = 1;
                json!({})
            }
            "query-migrate" if self.rounds > 0 => {
                self.rounds += 1;
                if self.rounds == self.shuts_down_in_round {
                    (self.status, self.rounds) = ("finish-migrate", 5);
                    self.events.extend(["SHUTDOWN", "STOP"]);
                }
                if self.rounds == self.stopped_in_round {
                    self.status = "paused";
                }
                let is_stuck = self.never_converges && self.status == "running";
                if self.rounds < 6 || (is_stuck && self.rounds < 1000) {
                    let left = if self.never_converges { 4096 } else { 4096 >> self.rounds };
                    return json!({"status": "active", "ram": {"dirty-sync-count": self.rounds, "remaining": left}});
                }
                (self.rounds, self.saved) = (0, !self.fails_to_save);
                if self.saved {
                    self.status = "postmigrate";
                    self.migrations += 1;
                    return json!({"status": "completed", "total-time": self.migrations});
                }
                json!({"status": "failed", "error-desc": "no room"})
            }
            "migrate" => {
                assert_ne!(self.status, "running", "a state is saved of a machine that stands still");
                assert!(self.capabilities["x-ignore-shared"]);
                let address = &arguments["channels"][0]["addr"];
                assert_eq!((&address["transport"], &address["offset"]), (&json!("file"), &json!(0)));
                self.saved = !self.fails_to_save;
                if self.saved {
                    std::fs::write(address["filename"].as_str().unwrap(), b"the state of its devices").unwrap();
                    self.status = "postmigrate";
                    self.migrations += 1;
                }
                json!({})
            }
            "query-migrate" if self.saves_for > 0 => {
                self.saves_for -= 1;
                if self.saves_for == 0 {
                    (self.saved, self.status) = (true, "postmigrate");
                    self.migrations += 1;
                }
                json!({"status": "active"})
            }
            "query-migrate" if self.migrations > 0 && !self.fails_to_save => {
                json!({"status": "completed", "total-time": self.migrations})
            }
            "query-migrate" => json!({"status": "failed", "error-desc": "no room"}),
            "cont" => {
                if self.status != "running" {
                    self.events.push("RESUME");
                }
                (self.status, self.saved) = ("running", false);
                json!({})
            }
            _ => json!({}),
        }
    }
}
