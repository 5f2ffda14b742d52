//! Firecracker and Cloud Hypervisor, as far as an agent sees them: stand-ins that do to files what those do, in their order.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use epochfs::vmm::agent::{Agent, Health, MachineAgent, MonitorAt};
use serde_json::{Value, json};

use crate::monitor::try_until_free;

const PAGE: usize = 4096;

/// A machine behind an API.
struct Machine {
    is_running: bool,
    memory: Vec<u8>,
    dirty: BTreeSet<usize>,
    /// The requests that changed something, shortened.
    told: Vec<String>,
    /// The disks that it writes to.
    disks: Vec<(&'static str, PathBuf)>,
    /// A request that fails, once, after half of its work.
    fails: Option<&'static str>,
    /// It refuses so often to go on.
    ignores: u32,
}

impl Machine {
    fn write(&mut self, page: usize, value: u8) {
        self.memory[page * PAGE..(page + 1) * PAGE].fill(value);
        self.dirty.insert(page);
    }

    fn answer(&mut self, request: &str, body: &Value) -> (u16, Value) {
        let state = if self.is_running { "Running" } else { "Paused" };
        if request == "GET /vm/config" {
            let drive =
                |(id, path): &(&str, PathBuf)| json!({"drive_id": id, "path_on_host": path, "is_read_only": false});
            let mut drives: Vec<Value> = self.disks.iter().map(drive).collect();
            drives.push(json!({"drive_id": "rootfs", "path_on_host": "/nonexistent/rom", "is_read_only": true}));
            return (200, json!({"drives": drives}));
        }
        if request.starts_with("GET ") {
            let disk = |(id, path): &(&str, PathBuf)| json!({"id": id, "path": path, "readonly": false});
            let mut disks: Vec<Value> = self.disks.iter().map(disk).collect();
            disks.push(json!({"id": "rom", "path": "/nonexistent/rom", "readonly": true}));
            return (200, json!({"state": state, "id": "anonymous-instance", "config": {"disks": disks}}));
        }
        let kind = body["snapshot_type"].as_str().or(body["state"].as_str()).unwrap_or_default();
        self.told.push(format!("{request} {kind}").trim().to_owned());
        if self.ignores > 0 && (kind == "Resumed" || request.ends_with("resume")) {
            self.ignores -= 1;
            return (500, json!({"fault_message": "it is busy"}));
        }
        let fails = self.fails.take_if(|fails| request.ends_with(*fails)).is_some();
        match request {
            "PATCH /vm" => self.is_running = kind == "Resumed",
            "PUT /api/v1/vm.pause" => self.is_running = false,
            "PUT /api/v1/vm.resume" => self.is_running = true,
            "PUT /snapshot/create" | "PUT /api/v1/vm.snapshot" => {
                if self.is_running {
                    return (400, json!({"fault_message": "the machine runs"}));
                }
                let done = match request {
                    "PUT /snapshot/create" => self.snapshot_of_firecracker(kind, body, fails),
                    _ => self.snapshot_of_cloud_hypervisor(body),
                };
                if let Err(error) = done {
                    return (500, json!({"fault_message": error.to_string()}));
                }
            }
            _ => return (404, json!({"fault_message": "no such request"})),
        }
        if fails { (500, json!({"fault_message": "it was told to fail"})) } else { (204, Value::Null) }
    }

    fn snapshot_of_firecracker(&mut self, kind: &str, body: &Value, breaks_off: bool) -> std::io::Result<()> {
        std::fs::write(body["snapshot_path"].as_str().unwrap(), format!("state {}", self.memory[0]))?;
        let path = Path::new(body["mem_file_path"].as_str().unwrap());
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        if file.metadata()?.len() != self.memory.len() as u64 {
            file.set_len(0)?;
        }
        file.set_len(self.memory.len() as u64)?;
        let dirty = std::mem::take(&mut self.dirty);
        let pages: Vec<usize> =
            if kind == "Full" { (0..self.memory.len() / PAGE).collect() } else { dirty.into_iter().collect() };
        let written = if breaks_off { pages.len() / 2 } else { pages.len() };
        for page in &pages[..written] {
            file.write_all_at(&self.memory[page * PAGE..(page + 1) * PAGE], (page * PAGE) as u64)?;
        }
        file.sync_all()
    }

    fn snapshot_of_cloud_hypervisor(&self, body: &Value) -> std::io::Result<()> {
        let directory = Path::new(body["destination_url"].as_str().unwrap().strip_prefix("file://").unwrap());
        let create = |name: &str| File::options().read(true).write(true).create_new(true).open(directory.join(name));
        create("config.json")?.write_all(b"{}")?;
        create("state.json")?.write_all(format!("{{\"state\": {}}}", self.memory[0]).as_bytes())?;
        let ranges = create("memory-ranges")?;
        ranges.set_len(self.memory.len() as u64)?;
        ranges.write_all_at(&self.memory, 0)
    }
}

fn serve(mut stream: UnixStream, machine: &Mutex<Machine>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let request = line.rsplit_once(" HTTP").map(|(request, _)| request.to_owned()).unwrap_or_default();
    let mut len = 0;
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 || line == "\r\n" {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            len = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; len];
    reader.read_exact(&mut body)?;
    // Whoever looks which process this is says nothing.
    if request.is_empty() {
        return Ok(());
    }
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let (status, answer) = machine.lock().unwrap().answer(&request, &body);
    let answer = if answer.is_null() { String::new() } else { answer.to_string() };
    stream.write_all(format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{answer}", answer.len()).as_bytes())
}

struct World {
    directory: tempfile::TempDir,
    live: PathBuf,
    socket: PathBuf,
    machine: Arc<Mutex<Machine>>,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let live = directory.path().join("web1/live");
        std::fs::create_dir_all(&live).unwrap();
        let socket = directory.path().join("api");
        let listener = UnixListener::bind(&socket).unwrap();
        let memory = (0..64).flat_map(|page| [page as u8 + 1; PAGE]).collect();
        let machine = Machine {
            is_running: true,
            memory,
            dirty: BTreeSet::new(),
            told: Vec::new(),
            disks: Vec::new(),
            fails: None,
            ignores: 0,
        };
        let machine = Arc::new(Mutex::new(machine));
        let of_thread = machine.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = serve(stream.unwrap(), &of_thread);
            }
        });
        Self { directory, live, socket, machine }
    }

    fn machine(&self) -> std::sync::MutexGuard<'_, Machine> {
        self.machine.lock().unwrap()
    }

    fn agent(&self, monitor: MonitorAt, state: &str) -> MachineAgent {
        self.try_agent(&monitor, state).unwrap()
    }

    fn try_agent(&self, monitor: &MonitorAt, state: &str) -> epochfs::Result<MachineAgent> {
        try_until_free(|| {
            let program = Path::new(env!("CARGO_BIN_EXE_epochfs"));
            MachineAgent::new(monitor, &self.live, state, self.directory.path(), program)
        })
    }

    fn firecracker(&self) -> MachineAgent {
        self.agent(MonitorAt::Firecracker(self.socket.clone()), "vmstate")
    }

    /// Captures, and compares what is frozen with the machine.
    fn capture(&self, agent: &mut MachineAgent, memory: &str) -> epochfs::Result<()> {
        let captured = agent.capture(&mut || {
            let machine = self.machine();
            assert!(!machine.is_running);
            assert!(
                std::fs::read(self.live.join(memory)).unwrap() == machine.memory,
                "what is frozen is the machine's memory"
            );
            Ok(())
        });
        assert!(self.machine().is_running);
        captured.map(|_| ())
    }

    fn told(&self) -> Vec<String> {
        std::mem::take(&mut self.machine().told)
    }
}

#[test]
fn firecracker_writes_everything_once_and_then_what_changed() {
    let world = World::new();
    let mut agent = world.firecracker();
    assert_eq!(agent.health(), Health::Running);
    world.machine().write(3, 9);
    world.capture(&mut agent, "memory").unwrap();
    assert_eq!(world.told(), ["PATCH /vm Paused", "PUT /snapshot/create Full", "PATCH /vm Resumed"]);
    world.machine().write(5, 0);
    world.capture(&mut agent, "memory").unwrap();
    assert_eq!(world.told()[1], "PUT /snapshot/create Diff");
    // Another agent knows it, too.
    drop(agent);
    let mut agent = world.firecracker();
    world.machine().write(7, 1);
    world.capture(&mut agent, "memory").unwrap();
    assert_eq!(world.told()[1], "PUT /snapshot/create Diff");
    // Memory that is not there any more is written whole.
    std::fs::remove_file(world.live.join("memory")).unwrap();
    world.capture(&mut agent, "memory").unwrap();
    assert_eq!(world.told()[1], "PUT /snapshot/create Full");
    world.machine().is_running = false;
    assert_eq!(agent.health(), Health::Idle("Paused".into()));
}

#[test]
fn p6_a_snapshot_that_broke_off_is_followed_by_one_of_everything() {
    let world = World::new();
    let mut agent = world.firecracker();
    world.capture(&mut agent, "memory").unwrap();
    (0..64).step_by(3).for_each(|page| world.machine().write(page, 200));
    // The pages that it did not come to are in no later difference.
    world.machine().fails = Some("/snapshot/create");
    world.capture(&mut agent, "memory").unwrap();
    let told = world.told();
    assert_eq!(told[told.len() - 3..], ["PUT /snapshot/create Diff", "PUT /snapshot/create Full", "PATCH /vm Resumed"]);
    // Nor is an agent trusted that was killed meanwhile: it leaves no note.
    world.machine().write(1, 77);
    let notes = std::fs::read_dir(world.directory.path()).unwrap();
    let note =
        notes.map(|entry| entry.unwrap().path()).find(|path| path.to_string_lossy().contains("complete-for-")).unwrap();
    std::fs::remove_file(note).unwrap();
    world.machine().dirty.clear();
    let another = MachineAgent::new(
        &MonitorAt::Firecracker(world.socket.clone()),
        &world.live,
        "vmstate",
        world.directory.path(),
        Path::new("/bin/false"),
    );
    assert_eq!(another.err().map(|error| error.kind()), Some(epochfs::error::Kind::Conflict), "one at a time");
    drop(agent);
    let mut agent = world.firecracker();
    world.capture(&mut agent, "memory").unwrap();
    assert_eq!(world.told()[1], "PUT /snapshot/create Full");
    for request in ["/vm", "/snapshot/create"] {
        world.machine().write(2, 42);
        world.machine().fails = Some(request);
        let _ = world.capture(&mut agent, "memory");
        world.capture(&mut agent, "memory").unwrap();
    }
}

#[test]
fn disks_that_no_epoch_holds_are_told() {
    let world = World::new();
    let (inside, outside) = (world.live.join("disk0"), world.directory.path().join("disk1"));
    for disk in [&inside, &outside] {
        std::fs::write(disk, b"").unwrap();
    }
    world.machine().disks = vec![("vda", inside), ("vdb", outside.clone())];
    let expected = [format!("vdb ({})", outside.display())];
    assert_eq!(world.firecracker().elsewhere(), expected);
    let mut agent = world.agent(MonitorAt::CloudHypervisor(world.socket.clone()), "snapshot");
    assert_eq!(agent.elsewhere(), expected);
}

#[test]
fn a_state_goes_over_nothing_that_the_machine_writes_to() {
    let world = World::new();
    std::fs::create_dir(world.live.join("disks")).unwrap();
    let (disk, of_directory) = (world.live.join("disk0"), world.live.join("disks/disk1"));
    for disk in [&disk, &of_directory] {
        std::fs::write(disk, b"a file system").unwrap();
    }
    world.machine().disks = vec![("vda", disk.clone()), ("vdb", of_directory.clone())];
    let firecracker = || MonitorAt::Firecracker(world.socket.clone());
    let cloud_hypervisor = || MonitorAt::CloudHypervisor(world.socket.clone());
    let refused = |monitor: MonitorAt, state: &str| {
        let error = world.try_agent(&monitor, state).err().unwrap_or_else(|| panic!("{monitor:?} {state}"));
        assert!(error.to_string().contains("would be written over"), "{error}");
    };
    refused(firecracker(), "disk0");
    refused(firecracker(), "memory");
    refused(cloud_hypervisor(), "disks");
    // What it has open, it does not have to be asked about. The stand-in's process is this one.
    world.machine().disks.clear();
    let open = File::options().write(true).open(&of_directory).unwrap();
    refused(cloud_hypervisor(), "disks");
    drop(open);
    // Only what a snapshot made is taken away for the next.
    let mut agent = world.agent(cloud_hypervisor(), "disks");
    let error = world.capture(&mut agent, "disks/memory-ranges").unwrap_err();
    assert!(error.to_string().contains("disk1 in") && error.to_string().contains("is of no snapshot"), "{error}");
    for disk in [&disk, &of_directory] {
        assert_eq!(std::fs::read(disk).unwrap(), b"a file system");
    }
}

#[test]
fn p6_a_machine_that_others_let_go_on_while_it_is_captured_is_of_no_moment() {
    let world = World::new();
    for state in ["vmstate", "snapshot"] {
        let mut agent = match state {
            "vmstate" => world.firecracker(),
            state => world.agent(MonitorAt::CloudHypervisor(world.socket.clone()), state),
        };
        let torn = agent.capture(&mut || {
            world.machine().is_running = true;
            Ok(())
        });
        assert!(torn.unwrap_err().to_string().contains("somebody else let web1 go on"));
        assert!(!agent.stood_still() && world.machine().is_running);
        agent.capture(&mut || Ok(())).unwrap();
        assert!(agent.stood_still());
    }
}

#[test]
fn what_others_stop_stays_stopped_and_what_an_agent_left_stopped_goes_on() {
    for state in ["vmstate", "snapshot"] {
        let world = World::new();
        let agent = || match state {
            "vmstate" => world.firecracker(),
            state => world.agent(MonitorAt::CloudHypervisor(world.socket.clone()), state),
        };
        let mut first = agent();
        let note = world.directory.path().join("stopped-web1");
        let mut noted = Vec::new();
        first
            .capture(&mut || {
                noted = std::fs::read(&note).unwrap();
                Ok(())
            })
            .unwrap();
        assert!(!note.exists());
        world.machine().is_running = false;
        let error = first.capture(&mut || panic!("it stands still for somebody else")).unwrap_err();
        assert!(error.to_string().contains("somebody else stopped it"), "{error}");
        assert_eq!(first.health(), Health::Idle("Paused".into()));
        assert!(!note.exists() && !world.machine().is_running);
        drop(first);
        // Another agent died with its guard.
        std::fs::write(&note, noted).unwrap();
        let mut next = agent();
        assert_eq!(next.health(), Health::Running);
        assert!(!note.exists() && world.machine().is_running);
        // It takes longer than its agent and the guard have tried, or does not answer meanwhile.
        world.machine().ignores = 1000;
        assert!(next.capture(&mut || Ok(())).is_err());
        assert!(!world.machine().is_running);
        world.machine().ignores = 0;
        assert_eq!(next.health(), Health::Running);
        assert!(!note.exists() && world.machine().is_running);
        // The guard sees that, too.
        std::thread::sleep(Duration::from_millis(300));
        world.machine().is_running = false;
        assert_eq!(next.health(), Health::Idle("Paused".into()));
    }
}

#[test]
fn cloud_hypervisor_gets_a_fresh_directory_each_time() {
    let world = World::new();
    let mut agent = world.agent(MonitorAt::CloudHypervisor(world.socket.clone()), "snapshot");
    for value in 1..4 {
        world.machine().write(0, value);
        world.capture(&mut agent, "snapshot/memory-ranges").unwrap();
        let state = std::fs::read_to_string(world.live.join("snapshot/state.json")).unwrap();
        assert_eq!(state, format!("{{\"state\": {value}}}"));
    }
    assert_eq!(world.told()[..3], ["PUT /api/v1/vm.pause", "PUT /api/v1/vm.snapshot", "PUT /api/v1/vm.resume"]);
    world.machine().fails = Some("vm.pause");
    assert!(world.capture(&mut agent, "snapshot/memory-ranges").is_err());
    world.machine().fails = Some("vm.resume");
    world.capture(&mut agent, "snapshot/memory-ranges").unwrap();
}
