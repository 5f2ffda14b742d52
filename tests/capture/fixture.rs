//! Machines on KVM with the guests of this project, and a repository for their epochs.

use std::fs::File;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use epochfs::capture::{Checkpoint, Protection, Settings, Tracker};
use epochfs::epoch::EpochStore;
use epochfs::platform::clock::Stopwatch;
use epochfs::platform::files::RealFiles;
use epochfs::platform::store::faulty::Rates;
use epochfs::platform::store::{FaultyStore, LocalStore};
use epochfs::repo::Repository;
use epochfs::vmm::kvm::{
    Event, Guest, MEMORY, Machine, Made, MemoryShape, Part, Report, Runner, STATE, Spec, Tracking, Wrap, own,
    read_state,
};
use epochfs::{CommitOptions, Owner};
use tempfile::TempDir;

pub use crate::asked::{is_long, seed, skip};

/// Whether guests can run and be protected here; if not, that is said.
pub fn can_run(test: &str) -> bool {
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        skip(test, &format!("/dev/kvm: {error}"));
        return false;
    }
    if let Err(error) = epochfs::uffd::Userfaultfd::open() {
        skip(test, &format!("userfaultfd: {error}"));
        return false;
    }
    if let Ok(filter) = std::env::var("EPOCHFS_LOG") {
        // The second test that asks for it has it already.
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
    }
    true
}

/// What a guest wrote to its serial port.
#[derive(Clone, Default)]
pub struct Printed(Arc<Mutex<Vec<u8>>>);

impl Printed {
    pub fn output(&self) -> epochfs::vmm::kvm::Output {
        let own = self.0.clone();
        Box::new(move |byte| own.lock().unwrap().push(byte))
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

/// Memory of so many MiB, with the hole after so many.
pub fn shape(megabytes: u64, hole: u64) -> MemoryShape {
    MemoryShape::new(megabytes << 20, hole << 20).unwrap()
}

pub fn spec(shape: MemoryShape, processors: u16) -> Spec {
    Spec { shape, processors, tracking: Tracking::Log }
}

#[track_caller]
pub fn boot(spec: &Spec, guest: &Guest) -> (Made, Vec<u64>, Printed) {
    let printed = Printed::default();
    let (made, written) = Machine::boot(spec, guest, printed.output()).unwrap();
    (made, written, printed)
}

/// Waits until so many processors have finished, and fails if one reports anything else.
#[track_caller]
pub fn wait_finished(machine: &Machine, processors: usize, patience: Duration) {
    let (since, mut finished) = (Stopwatch::start(), 0);
    while finished < processors {
        assert!(since.elapsed() < patience, "{finished} of {processors} processors finished within {patience:?}");
        match machine.wait(Duration::from_millis(100)) {
            Some(Event::Report(_, Report::Finished)) => finished += 1,
            Some(event) => panic!("{event:?}"),
            None => {}
        }
    }
}

/// A repository of one's own, on a store that fails once it is told to.
pub struct World {
    _directory: TempDir,
    pub store: Arc<EpochStore>,
    pub faulty: FaultyStore,
}

/// Tells what the tracker says, and nothing else.
pub fn honest(tracker: Box<dyn Tracker>) -> Box<dyn Tracker> {
    tracker
}

impl World {
    pub fn new() -> Self {
        Self::with_faults(1, Rates::default())
    }

    /// Faults come once `faulty` is enabled.
    pub fn with_faults(seed: u64, rates: Rates) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let local = LocalStore::create(&directory.path().join("repository"), Arc::new(RealFiles)).unwrap();
        let faulty = FaultyStore::new(Arc::new(local), seed, rates);
        faulty.set_enabled(false);
        let store = Arc::new(EpochStore::new(Repository::create(Arc::new(faulty.clone())).unwrap()));
        Self { _directory: directory, store, faulty }
    }

    pub fn owner() -> Owner {
        Owner { host: [7; 16], name: "test".into(), lease_ms: 0 }
    }

    fn protection(&self, machine: &str, from: Option<&epochfs::Epoch>, settings: &Settings) -> (Protection, u64) {
        let (ownership, base) = own(&self.store, machine, Self::owner(), from).unwrap();
        let protection = Protection {
            store: self.store.clone(),
            ownership,
            memory: MEMORY.into(),
            state: STATE.into(),
            options: CommitOptions { threads: 1, ..Default::default() },
            is_audited: settings.is_audited,
        };
        (protection, base)
    }

    /// A guest that does not run yet.
    #[track_caller]
    pub fn boot(&self, machine: &str, spec: &Spec, guest: &Guest, settings: Settings) -> Run {
        self.boot_with(machine, spec, guest, settings, &honest)
    }

    #[track_caller]
    pub fn boot_with(&self, machine: &str, spec: &Spec, guest: &Guest, settings: Settings, wrap: Wrap<'_>) -> Run {
        let (protection, _) = self.protection(machine, None, &settings);
        let runner = Runner::boot(spec, guest, Printed::default().output(), settings, wrap).unwrap();
        Run { runner, protection }
    }

    /// A guest from an epoch, that does not run yet, protected as this machine.
    #[track_caller]
    pub fn restore(&self, epoch: &str, machine: &str, tracking: Tracking, settings: Settings) -> Run {
        let from = self.store.epoch(&epoch.parse().unwrap()).unwrap();
        let (protection, base) = self.protection(machine, Some(&from), &settings);
        let base = self.store.epoch(&format!("{machine}@{base}").parse().unwrap()).unwrap();
        let runner = Runner::restore(&base, tracking, Printed::default().output(), settings, &honest).unwrap();
        Run { runner, protection }
    }

    /// The counts of an epoch's processors, and its memory.
    #[track_caller]
    pub fn epoch(&self, machine: &str, number: u64) -> (Vec<u64>, Vec<u8>) {
        let epoch = self.store.epoch(&format!("{machine}@{number}").parse().unwrap()).unwrap();
        let state = read_state(&epoch).unwrap();
        let spec = Machine::spec_of(&state, Tracking::Log).unwrap();
        // The fourth register is where a counter has its count.
        let count = |processor| {
            let registers = state.get(Some(processor), Part::Registers).unwrap();
            u64::from_le_bytes(registers[8..16].try_into().unwrap())
        };
        let mut stream = epoch.stream(MEMORY.as_bytes()).unwrap();
        let mut memory = vec![0; stream.len() as usize];
        stream.read_at(0, &mut memory).unwrap();
        ((0..spec.processors).map(count).collect(), memory)
    }
}

/// A guest, and its protection.
pub struct Run {
    pub runner: Runner,
    pub protection: Protection,
}

impl Run {
    pub fn machine(&mut self) -> &mut Machine {
        &mut self.runner.machine
    }

    /// One epoch now. The guest runs afterwards.
    #[track_caller]
    pub fn checkpoint(&mut self) -> Checkpoint {
        self.protection.checkpoint(&mut self.runner.capture, &mut self.runner.machine).unwrap()
    }

    /// Fails if the guest reported anything.
    #[track_caller]
    pub fn must_be_well(&self) {
        if let Some(event) = self.runner.machine.wait(Duration::ZERO) {
            panic!("{event:?}");
        }
        if let Some(failure) = self.runner.capture.failure()() {
            panic!("{failure}");
        }
    }
}
