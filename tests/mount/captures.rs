//! Epochs of machines that agents capture: of one moment at which they stood still, and of no other.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::Duration;

use epochfs::Kind;
use epochfs::ha::ProtectionStatus;
use epochfs::ops::control::{Client, CommitRequest};
use epochfs::ops::protect::Teller;
use epochfs::platform::clock::{BootClock, Clock};
use epochfs::platform::process::NamedProcess;
use rustix::io::Errno;

use crate::fixture::{Mount, Options};
use crate::support::{PAGE, errno, noise, open};

/// An epoch that somebody else makes between two of an agent has the memory of one moment and the device state of another.
#[test]
fn no_epoch_comes_between_those_of_an_agent() {
    let options = Options { expected: vec!["is protected by an agent"], ..Options::default() };
    let Some(mount) = Mount::with("no_epoch_comes_between_those_of_an_agent", options) else { return };
    for machine in ["web1", "web2"] {
        fs::write(mount.make_machine(machine).join("memory"), noise(1, PAGE)).unwrap();
    }
    let socket = mount.json(["status"])["daemons"][0]["socket"].as_str().unwrap().to_owned();
    let tell = |state: &str| {
        let status = ProtectionStatus { machine: "web1".into(), state: state.into(), ..ProtectionStatus::default() };
        Teller::new(socket.clone().into()).tell(&status);
        // Whoever asks then asks behind it.
        let told = |status: &serde_json::Value| status["daemons"][0]["protected"].to_string().contains(state);
        while !told(&mount.json(["status"])) {
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    tell("protected");
    assert_eq!(errno(&mount.commit("web1", "between").unwrap_err()), Some(Errno::BUSY));
    let output = mount.run(["commit", "web1"]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(4) && text.contains("epochfs tag web1"), "{text}");
    // What the agent asks for itself is made, and other machines are none of its business.
    let request = CommitRequest { machine: "web1".into(), is_capture: true, ..CommitRequest::default() };
    Client::connect(socket.as_ref()).unwrap().unwrap().commit(request, &mut |_| true).unwrap();
    mount.commit("web2", "other").unwrap();
    tell("ended");
    mount.commit("web1", "behind").unwrap();
    mount.finish();
}

/// What an agent has frozen when its machine may have gone on is of no moment.
#[test]
fn nothing_is_frozen_too_late_or_for_an_agent_that_is_gone() {
    let Some(mount) = Mount::new("nothing_is_frozen_too_late_or_for_an_agent_that_is_gone") else { return };
    fs::write(mount.make_machine("web1").join("memory"), noise(1, PAGE)).unwrap();
    let socket = mount.json(["status"])["daemons"][0]["socket"].as_str().unwrap().to_owned();
    let connect = || Client::connect(socket.as_ref()).unwrap().unwrap();
    let capture = |by: Duration| {
        let frozen_by_ms = Some(by.as_millis() as u64);
        let request =
            CommitRequest { machine: "web1".into(), is_capture: true, frozen_by_ms, ..CommitRequest::default() };
        let mut frozen = 0;
        let result = connect().commit(request, &mut |_| {
            frozen += 1;
            true
        });
        (result, frozen)
    };
    let soon = || BootClock.elapsed() + Duration::from_secs(10);
    let (late, frozen) = capture(BootClock.elapsed().saturating_sub(Duration::from_millis(1)));
    assert_eq!((late.unwrap_err().kind(), frozen), (Kind::Unavailable, 0));
    let first = capture(soon()).0.unwrap().epoch;
    let mut agent = Command::new("sleep").arg("60").spawn().unwrap();
    let process = NamedProcess::of(agent.id().cast_signed()).ok();
    let status =
        ProtectionStatus { machine: "web1".into(), state: "protected".into(), process, ..ProtectionStatus::default() };
    connect().tell_protection(&status).unwrap();
    assert_eq!(capture(soon()).0.unwrap().epoch, first + 1);
    agent.kill().unwrap();
    agent.wait().unwrap();
    let (gone, frozen) = capture(soon());
    let gone = gone.unwrap_err();
    assert!(gone.kind() == Kind::Conflict && gone.to_string().contains("is gone") && frozen == 0, "{gone}");
    // Who captures it from now on is another one.
    let process = NamedProcess::of(std::process::id().cast_signed()).ok();
    connect().tell_protection(&ProtectionStatus { process, ..status }).unwrap();
    assert_eq!(capture(soon()).0.unwrap().epoch, first + 2);
    mount.finish();
}

/// A machine that somebody let go on while it was captured is of no moment, nor one of which nobody says that it stood still. What
/// was frozen of it is in the next epoch.
#[test]
fn p6_no_epoch_is_made_of_a_machine_that_did_not_stand_still() {
    let options = Options { expected: vec!["stood still"], ..Options::default() };
    let Some(mount) = Mount::with("p6_no_epoch_is_made_of_a_machine_that_did_not_stand_still", options) else { return };
    let live = mount.make_machine("web1");
    fs::write(live.join("memory"), noise(1, 8 * PAGE)).unwrap();
    let first = mount.json(["commit", "web1"])["epoch"].as_u64().unwrap();
    let socket = mount.json(["status"])["daemons"][0]["socket"].as_str().unwrap().to_owned();
    let capture = |frozen: &mut dyn FnMut(Duration) -> bool| {
        let request =
            CommitRequest { machine: "web1".into(), is_capture: true, confirms: true, ..CommitRequest::default() };
        Client::connect(socket.as_ref()).unwrap().unwrap().commit(request, frozen)
    };
    let file = open(&live.join("memory")).unwrap();
    let write = |page: u64| file.write_all_at(&noise(10 + page, PAGE), page * PAGE as u64).unwrap();
    write(1);
    let torn = capture(&mut |_| {
        write(2);
        false
    });
    let torn = torn.unwrap_err();
    assert!(torn.kind() == Kind::Conflict && torn.to_string().contains("stood still"), "{torn}");
    // Its agent dies before it says anything.
    std::thread::scope(|scope| {
        let dies = scope.spawn(|| {
            capture(&mut |_| {
                write(3);
                std::panic::resume_unwind(Box::new("killed"))
            })
        });
        assert!(dies.join().is_err());
    });
    write(4);
    let made = capture(&mut |_| {
        write(5);
        true
    });
    assert_eq!(made.unwrap().epoch, first + 1, "nothing became an epoch before");
    drop(file);
    let content = fs::read(mount.machine("web1").join(format!("epochs/{}/memory", first + 1))).unwrap();
    let whole = noise(1, 8 * PAGE);
    for page in 0..8 {
        let written = noise(10 + page as u64, PAGE);
        let expected = if (1..5).contains(&page) { &written[..] } else { &whole[page * PAGE..(page + 1) * PAGE] };
        assert!(content[page * PAGE..(page + 1) * PAGE] == *expected, "page {page}");
    }
    mount.finish();
}
