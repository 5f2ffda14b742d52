//! A stand-in for QEMU's monitor, which keeps account of whether its machine runs.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

/// What it does instead of answering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Refuse,
    Close,
    /// Does what it was told, and closes the connection before it says so.
    CloseAfter,
}

#[derive(Debug)]
pub struct Machine {
    pub status: &'static str,
    /// What it was told, in order, without the questions.
    pub told: Vec<String>,
    /// The command that goes wrong next, and how; it does so once.
    pub fault: Option<(&'static str, Fault)>,
    pub memory: PathBuf,
    pub fails_to_save: bool,
    /// It is asked so often before the state that it saves just now is there; then it is stopped, whatever it was told meanwhile.
    pub saves_for: u32,
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
            fails_to_save: false,
            saves_for: 0,
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
        drop(machine);
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
            "query-memdev" => json!([{"id": "ram", "share": true}]),
            "qom-get" => json!(self.memory),
            "query-status" => json!({"status": self.status}),
            "stop" => {
                self.status = "paused";
                json!({})
            }
            "migrate" => {
                assert_ne!(self.status, "running", "a state is saved of a machine that stands still");
                let address = &arguments["channels"][0]["addr"];
                assert_eq!((&address["transport"], &address["offset"]), (&json!("file"), &json!(0)));
                self.saved = !self.fails_to_save;
                if self.saved {
                    std::fs::write(address["filename"].as_str().unwrap(), b"the state of its devices").unwrap();
                    self.status = "postmigrate";
                }
                json!({})
            }
            "query-migrate" if self.saves_for > 0 => {
                self.saves_for -= 1;
                if self.saves_for == 0 {
                    (self.saved, self.status) = (true, "postmigrate");
                }
                json!({"status": "active"})
            }
            "query-migrate" if self.saved => json!({"status": "completed"}),
            "query-migrate" => json!({"status": "failed", "error-desc": "no room"}),
            "cont" => {
                self.status = "running";
                json!({})
            }
            _ => json!({}),
        }
    }
}
