//! Removals against filling: what the kernel promises, and what the server makes of it.

use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use epochfs::uffd::{Filled, Options, Userfaultfd};
use rustix::event::{PollFd, PollFlags};

use crate::fixture::{Watchdog, World, wait_until};
use crate::vmm::{EVENT_REMOVE, Guest, Memory, PAGE, userfaultfd};

const PAGES: usize = 4096;

/// In a process of its own.
pub fn run(arguments: &[String]) {
    match arguments[0].as_str() {
        "kernel" => a_queued_removal_stops_all_filling(),
        "race" => remove_what_is_pushed(Path::new(&arguments[1])),
        other => panic!("{other}"),
    }
}

/// While a removal waits to be read nothing can be filled; once it was read, something can, and it goes first.
fn a_queued_removal_stops_all_filling() {
    let uffd = userfaultfd(EVENT_REMOVE).unwrap();
    let memory = Memory::new(16 * PAGE, 0, PAGE).unwrap();
    memory.register(uffd.as_fd()).unwrap();
    let server = Userfaultfd::adopt(uffd).unwrap();
    let content = [7; PAGE];
    assert_eq!(server.copy(memory.address(), &content), Ok(Filled::Bytes(PAGE as u64)));
    assert_eq!(server.copy(memory.address(), &content), Ok(Filled::Exists));
    std::thread::scope(|scope| {
        let removing = scope.spawn(|| memory.remove(0, 2 * PAGE).unwrap());
        let mut polled = [PollFd::new(&server, PollFlags::IN)];
        rustix::event::poll(&mut polled, None).unwrap();
        for _ in 0..1000 {
            assert_eq!(server.copy(memory.address() + 3 * PAGE as u64, &content), Ok(Filled::Busy));
            assert_eq!(server.zero(memory.address() + 3 * PAGE as u64, PAGE as u64), Ok(Filled::Busy));
        }
        assert!(!removing.is_finished());
        let mut message = [0; 32];
        assert_eq!(rustix::io::read(&server, &mut message), Ok(32));
        assert_eq!(message[0], 0x15);
        removing.join().unwrap();
    });
    // From here on the kernel would take whatever is given: nobody but the server knows that it must be zeros.
    assert_eq!(server.copy(memory.address(), &content), Ok(Filled::Bytes(PAGE as u64)));
    // Part of a run that meets a page that is there.
    assert_eq!(server.copy(memory.address() + 9 * PAGE as u64, &content), Ok(Filled::Bytes(PAGE as u64)));
    assert_eq!(server.copy(memory.address() + 7 * PAGE as u64, &[1; 4 * PAGE]), Ok(Filled::Bytes(2 * PAGE as u64)));
    assert_eq!(memory.word(9 * PAGE), 0x0707_0707_0707_0707);
    say("ok");
}

/// Gives each page up, and looks at it at once, while it is pushed from the other side.
fn remove_what_is_pushed(socket: &Path) {
    let guest = Guest::connect(vec![Memory::new(PAGES * PAGE, 0, PAGE).unwrap()], socket).unwrap();
    let memory = &guest.regions[0];
    say("ready");
    for page in 0..PAGES {
        memory.remove(page * PAGE, PAGE).unwrap();
        let word = memory.word(page * PAGE);
        if word != 0 {
            say(&format!("WRONG page {page}: {word:#x} after it was removed"));
            return;
        }
    }
    say("ok");
}

fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "guest: {text}").unwrap();
    out.flush().unwrap();
}

fn last_word(child: &mut std::process::Child) -> String {
    let _watchdog = Watchdog::new(child.id(), Duration::from_secs(60));
    let mut text = String::new();
    std::io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut text).unwrap();
    child.wait().unwrap();
    text.lines().filter_map(|line| line.split_once("guest: ")).next_back().unwrap_or_default().1.to_owned()
}

#[test]
fn the_kernel_fills_nothing_while_a_removal_waits_to_be_read() {
    let Some(_world) = World::new("removals in the kernel", 1) else { return };
    let mut child =
        crate::process::command("removal", &["kernel"]).stderr(std::process::Stdio::inherit()).spawn().unwrap();
    assert_eq!(last_word(&mut child), "ok");
}

#[test]
fn p5_what_is_removed_while_it_is_pushed_is_zeros() {
    let Some(world) = World::new("removals and pushes", PAGES) else { return };
    let server = world.server(Options::default());
    let socket = world.socket();
    let mut child = crate::process::command("removal", &["race", socket.to_str().unwrap()])
        .stderr(std::process::Stdio::inherit())
        .spawn()
        .unwrap();
    wait_until("the guest is there", || server.vms().len() == 1);
    let vm = server.vm(server.vms()[0].id).unwrap();
    let image = std::fs::read(&world.image).unwrap();
    let (pages, _) = image.as_chunks::<PAGE>();
    let pushing = std::thread::spawn({
        let (vm, pages) = (vm.clone(), pages.to_vec());
        move || {
            // Where the guest is just now, as far as one can tell, and everywhere else.
            let mut pushed = 0;
            while vm.end().is_none() {
                let at = (vm.status().removals as usize).min(PAGES - 1);
                for first in [at.saturating_sub(2), at, at + 1, (at * 7) % PAGES] {
                    let last = PAGES.min(first + 24);
                    match vm.push(first as u64, &pages[first.min(last)..last]) {
                        Ok(some) => pushed += some.filled,
                        Err(_) => return pushed,
                    }
                }
            }
            pushed
        }
    });
    assert_eq!(last_word(&mut child), "ok");
    wait_until("the guest is gone", || vm.end().is_some());
    assert!(pushing.join().unwrap() > 0);
}
