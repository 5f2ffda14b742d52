//! What a machine said before a moment is let out when that moment's epoch is durable, and not before.

use std::sync::{Arc, Mutex};

use epochfs::ha::{Epochs, Host, OutputProgram, Outputs, Policy, Protection, Stored, Target, Ticket, Totals, protect};
use epochfs::vmm::agent::{Agent, Capture, Health};
use epochfs::{Error, Result};

type Told = Arc<Mutex<Vec<String>>>;

struct Machine(Told);

impl Agent for Machine {
    fn health(&mut self) -> Health {
        Health::Running
    }

    fn capture(&mut self, freeze: &mut dyn FnMut() -> Result<()>) -> Result<Capture> {
        self.0.lock().unwrap().push("stop".into());
        let frozen = freeze();
        self.0.lock().unwrap().push("go on".into());
        frozen.map(|()| Capture::default())
    }

    fn fence(&mut self) -> Result<()> {
        Ok(())
    }
}

struct Store(Told, bool);

impl Epochs for Store {
    fn freeze(&mut self) -> Result<Ticket> {
        let (sender, done) = crossbeam_channel::bounded(1);
        self.0.lock().unwrap().push("freeze".into());
        let stored = if self.1 { Ok(Stored { epoch: 7, ..Stored::default() }) } else { Err(Error::conflict("no")) };
        sender.send(stored).unwrap();
        Ok(Ticket { done, stood_still: crossbeam_channel::bounded(1).0 })
    }
}

struct Buffer(Told, bool);

impl Outputs for Buffer {
    fn frozen(&mut self, moment: u64) -> Result<()> {
        self.0.lock().unwrap().push(format!("frozen {moment}"));
        if self.1 { Ok(()) } else { Err(Error::conflict("it is full")) }
    }

    fn durable(&mut self, moment: u64) -> Result<()> {
        self.0.lock().unwrap().push(format!("durable {moment}"));
        Ok(())
    }
}

fn told(stores: bool, holds: bool) -> (bool, Vec<String>) {
    let told = Told::default();
    let protection = Protection {
        machine: "web1".into(),
        policy: Policy::new(Target::default()),
        weight: 1.0,
        agent: Box::new(Machine(told.clone())),
        epochs: Box::new(Store(told.clone(), stores)),
        host: Arc::new(Host::new(Totals { time: 1.0, store_rate: None })),
        heartbeat: None,
        outputs: Some(Box::new(Buffer(told.clone(), holds))),
    };
    let (_stop, stopped) = crossbeam_channel::bounded(0);
    let is_made = protect(protection, true, &stopped, &mut |_| ()).is_ok();
    let told = told.lock().unwrap().clone();
    (is_made, told)
}

#[test]
fn what_was_said_goes_out_when_its_epoch_is_durable() {
    let (is_made, told) = told(true, true);
    assert_eq!((is_made, &*told), (true, &["stop", "frozen 1", "freeze", "go on", "durable 1"].map(String::from)[..]));
}

#[test]
fn what_was_said_stays_where_there_is_no_epoch() {
    let (is_made, all) = told(false, true);
    assert_eq!((is_made, &*all), (false, &["stop", "frozen 1", "freeze", "go on"].map(String::from)[..]));
    let (is_made, all) = told(true, false);
    assert_eq!((is_made, &*all), (false, &["stop", "frozen 1", "go on"].map(String::from)[..]));
}

#[test]
fn a_program_is_told_and_started_again_after_it_failed() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    // It ends when it is told of the third moment.
    let script = format!(
        "while read what number; do echo $what $number >> {0}; [ $number = 3 ] && exit; echo ok; done",
        log.display()
    );
    let mut program = OutputProgram::new(&script);
    program.frozen(1).unwrap();
    program.durable(1).unwrap();
    let error = program.frozen(3).unwrap_err();
    assert!(error.to_string().contains("and ended"), "{error}");
    program.frozen(4).unwrap();
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "frozen 1\ndurable 1\nfrozen 3\nfrozen 4\n");
}

#[test]
fn what_does_not_answer_well_is_named() {
    for (script, text) in
        [("read line; echo no", "answered \"no\""), ("sleep 9", "did not answer"), ("exit 1", "frozen")]
    {
        let error = OutputProgram::new(script).frozen(1).unwrap_err();
        assert!(error.to_string().contains(text) && error.next_step().is_some(), "{error}");
    }
}
