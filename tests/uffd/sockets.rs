//! The socket itself, and the command round it.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use rustix::process::Signal;

use crate::fixture::{GuestProcess, Program, World, wait_until};

const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn a_socket_is_private_and_goes_with_its_server() {
    let Some(world) = World::new("sockets", 16) else { return };
    // One that a dead server left.
    drop(UnixListener::bind(world.socket()).unwrap());
    assert!(world.socket().exists());
    let mut program = Program::start(&world, &[]);
    assert_eq!(std::fs::metadata(world.socket()).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!((program.ready["machine"].as_str(), program.ready["epoch"].as_u64()), (Some("web1"), Some(1)));
    assert_eq!(program.ready["bytes"], 16 * 4096);
    let refused = |arguments: &[&str], code: i32, text: &str| {
        let output = world.command(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(text), "{said}");
    };
    let socket = world.socket().into_os_string().into_string().unwrap();
    refused(&["serve-uffd", "web1", "--socket", &socket], 4, "somebody listens");
    program.signal(Signal::INT);
    assert!(program.ended(PATIENCE).success());
    assert!(!world.socket().exists());
    std::fs::write(world.path("file"), b"precious").unwrap();
    refused(&["serve-uffd", "web1", "--socket", world.path("file").to_str().unwrap()], 4, "is no socket");
    assert_eq!(std::fs::read(world.path("file")).unwrap(), b"precious");
    refused(&["serve-uffd", "web1", "--socket", world.path("none/socket").to_str().unwrap()], 5, "cannot make");
    refused(&["serve-uffd", "web2", "--socket", &socket], 5, "web2");
    refused(&["serve-uffd", "web1@7", "--socket", &socket], 5, "7");
    refused(&["serve-uffd", "web1", "--stream", "other", "--socket", &socket], 5, "other");
    refused(&["serve-uffd", "web1"], 2, "--socket");
    refused(&["serve-uffd", "web1", "--socket", &socket, "--paused"], 2, "--cloud-hypervisor");
    refused(&["serve-uffd", "web1", "--socket", &socket, "--directory", "x"], 2, "--cloud-hypervisor");
    assert!(!world.socket().exists());
}

#[test]
fn a_server_in_the_background_is_shown_and_outlives_who_started_it() {
    let Some(world) = World::new("servers in the background", 256) else { return };
    let socket = world.socket().into_os_string().into_string().unwrap();
    let document = |arguments: &[&str]| -> serde_json::Value {
        let output = world.command(arguments).stderr(std::process::Stdio::inherit()).output().unwrap();
        assert!(output.status.success(), "{arguments:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let servers = || document(&["status", "--json"])["page_fault_servers"].as_array().unwrap().clone();
    assert!(servers().is_empty());
    let started = document(&["--json", "serve-uffd", "web1@1", "--socket", &socket, "--background"]);
    let log = std::path::PathBuf::from(started["log"].as_str().unwrap());
    let [server] = &servers()[..] else { panic!("{:?}", servers()) };
    for (field, value) in [("machine", "web1"), ("stream", "memory"), ("socket", &socket)] {
        assert_eq!(server[field], value);
    }
    assert_eq!((&server["pid"], &server["vms"], &server["epoch"]), (&started["pid"], &0.into(), &1.into()));
    let mut orders = world.orders(1);
    orders.waits = true;
    orders.operations = 100;
    let mut guest = GuestProcess::start(&orders);
    guest.must_say("ready");
    guest.must_say("done");
    wait_until("the VM is shown", || servers()[0]["vms"] == 1);
    let told = world.command(&["status"]).output().unwrap();
    assert!(String::from_utf8_lossy(&told.stdout).contains("web1@1"), "{told:?}");
    drop(guest);
    wait_until("the VM is gone", || servers()[0]["vms"] == 0);
    let again = world.command(&["serve-uffd", "web1", "--socket", &socket, "--background"]).output().unwrap();
    assert_eq!(again.status.code(), Some(4), "{}", String::from_utf8_lossy(&again.stderr));
    let pid = rustix::process::Pid::from_raw(started["pid"].as_u64().unwrap() as i32).unwrap();
    rustix::process::kill_process(pid, Signal::TERM).unwrap();
    wait_until("the server is gone", || servers().is_empty());
    assert!(!world.socket().exists());
    assert!(std::fs::read_to_string(log).unwrap().contains("serving memory of web1@1"));
}

#[test]
fn a_socket_with_a_long_path_works() {
    let Some(world) = World::new("long paths", 256) else { return };
    let directory = world.path(&"d".repeat(120));
    std::fs::create_dir(&directory).unwrap();
    let mut server = epochfs::uffd::Server::new(world.image(), epochfs::uffd::Options::default()).unwrap();
    server.listen(&directory.join("socket")).unwrap();
    // The guest's own call takes short paths alone.
    let link = world.path("link");
    std::os::unix::fs::symlink(&directory, &link).unwrap();
    let mut orders = world.orders(1);
    orders.socket = link.join("socket");
    orders.operations = 500;
    let mut guest = GuestProcess::start(&orders);
    for text in ["ready", "done", "ok"] {
        guest.must_say(text);
    }
    drop(server);
    assert!(!directory.join("socket").exists());
}
