//! Who may connect may send anything: it is refused, with a line that says why, and others are served as before.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use crate::fixture::{GuestProcess, Program, World, connect, wait_until};
use crate::vmm::{EVENT_REMOVE, Memory, PAGE, send, userfaultfd};

const PATIENCE: Duration = Duration::from_secs(30);

/// A VM in a process of its own that describes its memory wrongly, and then waits for ever.
pub fn run(arguments: &[String]) {
    let uffd = userfaultfd(EVENT_REMOVE).unwrap();
    let memory = Memory::new(4 * PAGE, 0, PAGE).unwrap();
    memory.register(uffd.as_fd()).unwrap();
    let socket = UnixStream::connect(Path::new(&arguments[0])).unwrap();
    let text = arguments[1].replace("ADDRESS", &memory.address().to_string());
    send(&socket, text.as_bytes(), &[uffd.as_fd()]).unwrap();
    memory.word(usize::from(arguments[1] == "valid"));
}

fn region(address: u64, size: u64, offset: u64) -> String {
    format!(r#"{{"base_host_virt_addr":{address},"size":{size},"offset":{offset},"page_size":4096}}"#)
}

#[test]
fn hostile_handshakes_are_refused_and_others_are_served() {
    let Some(world) = World::new("hostile handshakes", 1024) else { return };
    let len = world.len as u64;
    let program = Program::start(&world, &["--on-damage", "hold"]);
    let uffd = userfaultfd(EVENT_REMOVE).unwrap();
    let silent_on_removals = userfaultfd(0).unwrap();
    let file = File::open("/dev/null").unwrap();
    let good = format!("[{}]", region(0x10000, len, 0));
    let socket = world.socket();
    let mut open = Vec::new();
    let mut refused = 0;
    let mut refuses = |what: &str, why: &str, bytes: &[u8], descriptors: &[std::os::fd::BorrowedFd<'_>]| {
        let connection = connect(&socket);
        send(&connection, bytes, descriptors).unwrap();
        refused += 1;
        wait_until(what, || program.log().matches("refused process").count() == refused);
        let log = program.log();
        let line = log.lines().rfind(|line| line.contains("refused process")).unwrap();
        assert!(line.contains(why) && line.contains("WARN"), "{what}: {line}");
        assert!(line.contains(&format!("process {}", std::process::id())), "{line}");
        open.push(connection);
    };
    let regions = |regions: &[String]| format!("[{}]", regions.join(","));
    let overlapping = regions(&[region(0x10000, 8192, 0), region(0x11000, 4096, 8192)]);
    let twice = regions(&[region(0x10000, 8192, 0), region(0x20000, 8192, 4096)]);
    refuses("no descriptor", "no descriptor", good.as_bytes(), &[]);
    refuses("two descriptors", "more than one", good.as_bytes(), &[uffd.as_fd(), uffd.as_fd()]);
    refuses("many descriptors", "more than one", good.as_bytes(), &[uffd.as_fd(); 12]);
    refuses("a file", "no userfaultfd", good.as_bytes(), &[file.as_fd()]);
    refuses("no removals", "removed pages", good.as_bytes(), &[silent_on_removals.as_fd()]);
    refuses("overlapping regions", "overlap", overlapping.as_bytes(), &[uffd.as_fd()]);
    refuses("the same content twice", "same content", twice.as_bytes(), &[uffd.as_fd()]);
    refuses("half pages", "whole pages", regions(&[region(0x10000, 100, 0)]).as_bytes(), &[uffd.as_fd()]);
    refuses("past the end", "ends past", regions(&[region(0x10000, len, 4096)]).as_bytes(), &[uffd.as_fd()]);
    refuses("no memory", "no memory", b"[]", &[uffd.as_fd()]);
    refuses("no list", "no known way", b"\"hello\"", &[uffd.as_fd()]);
    refuses("not UTF-8", "no known way", b"[\xff\xfe]", &[uffd.as_fd()]);
    refuses("half a message", "not say all", &good.as_bytes()[..20], &[uffd.as_fd()]);
    refuses("a long message", "too great a length", &b" ".repeat((256 << 10) + 1), &[uffd.as_fd()]);
    drop(open);

    // Somebody who only looks in, and somebody who says nothing while others come.
    drop(connect(&socket));
    let _silent = connect(&socket);
    // A message in two parts, a long one, and fields that nobody knows.
    let mut orders = world.orders(1);
    orders.operations = 500;
    let mut guest = GuestProcess::start(&orders);
    for text in ["ready", "done", "ok"] {
        guest.must_say(text);
    }
    let log = program.log();
    assert!(!log.contains("killed") && !log.contains("panicked"), "{log}");
}

#[test]
fn a_vm_that_cannot_be_served_is_killed_and_not_left_waiting() {
    let Some(world) = World::new("VMs that cannot be served", 16) else { return };
    let program = Program::start(&world, &[]);
    let socket = world.socket();
    let text = r#"[{"base_host_virt_addr":ADDRESS,"size":16384,"offset":1048576,"page_size":4096}]"#;
    let mut child = crate::process::command("hostile", &[socket.to_str().unwrap(), text]).spawn().unwrap();
    let _watchdog = crate::fixture::Watchdog::new(child.id(), PATIENCE);
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    // It is said after it is done.
    wait_until("it is said", || program.log().contains("its memory cannot be served"));
}

/// Whoever has handed memory over looks at nothing that would tell that the server is about to end.
#[test]
fn vms_that_come_while_the_server_is_told_to_end_are_served_or_sent_away_and_never_left_waiting() {
    let text = r#"[{"base_host_virt_addr":ADDRESS,"size":16384,"offset":0,"page_size":4096}]"#;
    let mut served = 0;
    for round in 0..6 {
        let Some(world) = World::new("VMs that come late", 16) else { return };
        let mut program = Program::start(&world, &[]);
        let socket = world.socket();
        let start = || {
            let mut command = crate::process::command("hostile", &[socket.to_str().unwrap(), text]);
            command.stderr(std::process::Stdio::null()).spawn().unwrap()
        };
        let children: Vec<_> = (0..12).map(|_| start()).collect();
        std::thread::sleep(Duration::from_millis(round * 4));
        program.signal(rustix::process::Signal::TERM);
        for mut child in children {
            let _watchdog = crate::fixture::Watchdog::new(child.id(), PATIENCE);
            let ended = child.wait().unwrap();
            // One that found nobody at the socket says so; none is killed by a watchdog.
            assert!(ended.code().is_some(), "{ended}: {}", program.log());
            served += u32::from(ended.success());
        }
        assert!(program.ended(PATIENCE).success(), "{}", program.log());
    }
    assert!(served > 0, "none came in time");
}

#[test]
fn a_message_in_parts_with_much_in_it_is_understood() {
    let Some(world) = World::new("long handshakes", 1024) else { return };
    let server = world.server(epochfs::uffd::Options::default());
    let uffd = userfaultfd(EVENT_REMOVE).unwrap();
    let many: Vec<String> = (0..256_u64)
        .map(|n| {
            format!(
                r#"{{"base_host_virt_addr":{},"size":16384,"offset":{},"page_size_kib":4096,"what":["ever",{{"x":null}}]}}"#,
                0x7000_0000_0000 + n * 0x10_0000,
                (255 - n) * 16384
            )
        })
        .collect();
    let text = format!("[{}]", many.join(",\n"));
    assert!(text.len() > 20_000);
    let mut socket = connect(&world.socket());
    send(&socket, &text.as_bytes()[..7000], &[uffd.as_fd()]).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert!(server.vms().is_empty());
    socket.write_all(&text.as_bytes()[7000..]).unwrap();
    wait_until("it is served", || server.vms().len() == 1);
    assert_eq!(server.vms()[0].bytes, 256 * 16384);
}
