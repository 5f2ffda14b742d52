//! Cloud Hypervisor's side of a restore on demand: it listens, takes memory files, registers them, and asks for each page.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use epochfs::CommitOptions;
use epochfs::epoch::EpochStore;
use epochfs::platform::random::Seeded;
use rustix::fs::FallocateFlags;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use crate::fixture::{Watchdog, World, wait_until};
use crate::vmm::{Memory, PAGE, userfaultfd};

const PATIENCE: Duration = Duration::from_secs(60);
const MISSING_SHMEM: u64 = 1 << 5;
const MINOR_SHMEM: u64 = 1 << 10;

#[repr(C)]
struct Continue {
    start: u64,
    len: u64,
    mode: u64,
    mapped: i64,
}

const CONTINUE: Opcode = opcode::read_write::<Continue>(0xaa, 7);

/// What the monitor's process is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Orders {
    socket: PathBuf,
    image: PathBuf,
    /// How much of the image is in slot 0; the rest is in slot 3.
    cut: usize,
    seed: u64,
    operations: u64,
    refuses_state: bool,
}

/// As the configuration has it: slot, address, length, where it begins in its file.
fn mappings(cut: usize, len: usize) -> [(u32, u64, usize, usize); 2] {
    [(0, 0, cut, 0), (3, 4 << 30, len - cut, 8 * PAGE)]
}

fn request(stream: &mut UnixStream) -> (u16, Vec<u8>) {
    let mut header = [0; 16];
    stream.read_exact(&mut header).unwrap();
    assert_eq!(header[2..8], [0; 6]);
    let len = u64::from_le_bytes(header[8..].try_into().unwrap()) as usize;
    let command = u16::from_le_bytes([header[0], header[1]]);
    // A memory file comes with its number, and is received otherwise.
    let mut payload = vec![0; if command == 7 { 0 } else { len }];
    stream.read_exact(&mut payload).unwrap();
    (command, payload)
}

fn answer(stream: &mut UnixStream, status: u16) {
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&status.to_le_bytes());
    stream.write_all(&bytes).unwrap();
}

fn memory_file(stream: &UnixStream) -> (u32, OwnedFd) {
    let mut number = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(&mut number)];
    rustix::net::recvmsg(stream, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(some) = message {
            files.extend(some);
        }
    }
    assert_eq!(files.len(), 1);
    (u32::from_le_bytes(number), files.pop().unwrap())
}

/// A slot as the monitor has it.
struct Slot {
    gpa: u64,
    memory: Memory,
    file: OwnedFd,
    file_offset: usize,
}

/// The connection by which pages are asked for; used by one thread at a time, as there.
struct Faults(UnixStream);

impl Faults {
    fn ask(&mut self, gpa: u64, len: u64) -> u16 {
        let mut bytes = [0; 32];
        bytes[0] = 9;
        bytes[8] = 16;
        bytes[16..24].copy_from_slice(&gpa.to_le_bytes());
        bytes[24..].copy_from_slice(&len.to_le_bytes());
        self.0.write_all(&bytes).unwrap();
        let mut answer = [0; 16];
        self.0.read_exact(&mut answer).unwrap();
        assert_eq!(answer[8..], [0; 8], "an answer has no payload");
        u16::from_le_bytes([answer[0], answer[1]])
    }
}

pub fn run(arguments: &[String]) {
    let orders: Orders = serde_json::from_str(&arguments[0]).unwrap();
    let said = monitor(&orders).map_or_else(|wrong| wrong, |()| "ok".to_owned());
    let mut out = std::io::stdout().lock();
    writeln!(out, "guest: {said}").unwrap();
    out.flush().unwrap();
}

fn monitor(orders: &Orders) -> Result<(), String> {
    let listener = UnixListener::bind(&orders.socket).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    assert_eq!(request(&mut stream), (1, Vec::new()));
    answer(&mut stream, 1);
    let len = std::fs::metadata(&orders.image).unwrap().len() as usize;
    let mut slots = Vec::new();
    for (number, gpa, len, file_offset) in mappings(orders.cut, len) {
        assert_eq!(request(&mut stream).0, 7);
        let (sent, file) = memory_file(&stream);
        assert_eq!(sent, number);
        assert_eq!(rustix::fs::fstat(&file).unwrap().st_size as usize, file_offset + len);
        let memory = Memory::shared(len, 0, &file, file_offset).unwrap();
        slots.push(Slot { gpa, memory, file, file_offset });
        answer(&mut stream, 1);
    }
    let (command, config) = request(&mut stream);
    assert_eq!(command, 2);
    assert!(String::from_utf8(config).unwrap().contains("guest_ram_mappings"));
    answer(&mut stream, 1);
    let (mut faults, _) = listener.accept().unwrap();
    let mut role = [0; 2];
    faults.read_exact(&mut role).unwrap();
    assert_eq!(role, [2, 0]);
    let uffd = userfaultfd(MISSING_SHMEM | MINOR_SHMEM).unwrap();
    for slot in &slots {
        slot.memory.register_shared(uffd.as_fd()).unwrap();
    }
    let (command, state) = request(&mut stream);
    assert_eq!((command, &state[..]), (3, &b"registers"[..]));
    if orders.refuses_state {
        answer(&mut stream, 2);
        return Ok(());
    }
    answer(&mut stream, 1);
    assert_eq!(request(&mut stream).0, 5);
    answer(&mut stream, 1);

    let image = File::open(&orders.image).unwrap();
    let mut faults = Faults(faults);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| serve(&uffd, &slots, &mut faults, &stop));
        let looked = look(orders, &slots, &image);
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
        serving.join().unwrap();
        looked
    })?;
    // Everything is there now, or was given up; asked for again, it stays what it is.
    for slot in &slots {
        slot.memory.write(0, &[9; 100]);
        assert_eq!(faults.ask(slot.gpa, PAGE as u64), 1);
        let mut bytes = [0; 100];
        slot.memory.read(0, &mut bytes);
        if bytes != [9; 100] {
            return Err("WRONG: what the guest wrote was overwritten".to_owned());
        }
    }
    drop(faults);
    Ok(())
}

/// The monitor's thread that has its faults answered. It asks for some pages twice, and for others unasked.
fn serve(uffd: &OwnedFd, slots: &[Slot], faults: &mut Faults, stop: &std::sync::atomic::AtomicBool) {
    let mut seeded = Seeded::new(4);
    let mut next = (0, 0);
    while !stop.load(std::sync::atomic::Ordering::SeqCst) {
        let mut message = [0; 32];
        let (slot, page) = match rustix::io::read(uffd, &mut message) {
            Ok(32) => {
                assert_eq!(message[0], 0x12);
                let address = u64::from_ne_bytes(message[16..24].try_into().unwrap());
                let has = |slot: &&Slot| {
                    (slot.memory.address()..slot.memory.address() + slot.memory.len as u64).contains(&address)
                };
                let slot = slots.iter().find(has).unwrap();
                (slot, (address - slot.memory.address()) as usize / PAGE)
            }
            _ if seeded.chance(100) => {
                // Ahead of use, in order, as long as there is something left.
                let slot = &slots[next.0];
                let page = next.1;
                next = if (page + 1) * PAGE < slot.memory.len { (next.0, page + 1) } else { ((next.0 + 1) % 2, 0) };
                (slot, page)
            }
            _ => {
                std::thread::sleep(Duration::from_micros(50));
                continue;
            }
        };
        for _ in 0..1 + seeded.below(2) {
            assert_eq!(faults.ask(slot.gpa + (page * PAGE) as u64, PAGE as u64), 1);
        }
        let start = slot.memory.address() + (page * PAGE) as u64;
        let mut go_on = Continue { start, len: PAGE as u64, mode: 0, mapped: 0 };
        // SAFETY: the type is the one that belongs to the code, and the range is registered.
        match unsafe { ioctl(uffd, Updater::<CONTINUE, _>::new(&mut go_on)) } {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            // It was given up in between; whoever waits for it says so again.
            Err(rustix::io::Errno::FAULT) => {}
            Err(error) => panic!("CONTINUE: {error}"),
        }
        crate::vmm::wake(uffd.as_fd(), start, PAGE as u64).unwrap();
    }
}

fn look(orders: &Orders, slots: &[Slot], image: &File) -> Result<(), String> {
    let mut seeded = Seeded::of(orders.seed, 5);
    let mut expected = std::collections::BTreeMap::new();
    let wanted = |expected: &std::collections::BTreeMap<(usize, usize), u8>, slot: usize, page: usize| {
        let mut bytes = vec![0; PAGE];
        match expected.get(&(slot, page)) {
            Some(byte) => bytes.fill(*byte),
            None => image.read_exact_at(&mut bytes, (slot * orders.cut + page * PAGE) as u64).unwrap(),
        }
        bytes
    };
    let same = |slot: usize, page: usize, wanted: &[u8]| {
        let mut bytes = vec![0; PAGE];
        slots[slot].memory.read(page * PAGE, &mut bytes);
        match bytes == wanted {
            true => Ok(()),
            false => Err(format!("WRONG page {page} of slot {slot}: {:x?} and not {:x?}", &bytes[..8], &wanted[..8])),
        }
    };
    for _ in 0..orders.operations {
        let slot = seeded.below(2) as usize;
        let page = seeded.below((slots[slot].memory.len / PAGE) as u64) as usize;
        match seeded.below(8) {
            0..5 => same(slot, page, &wanted(&expected, slot, page))?,
            5..7 => {
                let byte = 1 + seeded.below(255) as u8;
                slots[slot].memory.write(page * PAGE, &[byte; PAGE]);
                expected.insert((slot, page), byte);
            }
            _ => {
                // A balloon gives up a page that was there.
                same(slot, page, &wanted(&expected, slot, page))?;
                let offset = (slots[slot].file_offset + page * PAGE) as u64;
                let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&slots[slot].file, punch, offset, PAGE as u64).unwrap();
                expected.insert((slot, page), 0);
            }
        }
    }
    for (slot, its) in slots.iter().enumerate() {
        for page in 0..its.memory.len / PAGE {
            same(slot, page, &wanted(&expected, slot, page))?;
        }
    }
    Ok(())
}

/// A snapshot as the offload daemon writes it, in an epoch of `ch1`.
fn commit(world: &World, cut: usize) {
    let mappings = mappings(cut, world.len).map(|(slot, gpa, size, file_offset)| {
        serde_json::json!({"slot": slot, "gpa": gpa, "size": size, "file_offset": file_offset, "virtio_mem": false})
    });
    let config = serde_json::json!({"vm_config": {}, "memory_manager_data": {"guest_ram_mappings": mappings}});
    let image = std::fs::read(&world.image).unwrap();
    let store = EpochStore::open_directory(&world.path("repository")).unwrap();
    let mut commit = store.begin_commit("ch1", CommitOptions::default()).unwrap();
    commit.add_bytes("snapshot/migration_config.json", config.to_string().into_bytes()).unwrap();
    commit.add_bytes("snapshot/state.json", b"registers".to_vec()).unwrap();
    commit.add_bytes("snapshot/memory-0", image[..cut].to_vec()).unwrap();
    commit.add_bytes("snapshot/memory-3", image[cut..].to_vec()).unwrap();
    commit.finish().unwrap();
}

fn start_monitor(world: &World, cut: usize, operations: u64, refuses_state: bool) -> Child {
    let orders = Orders { socket: world.socket(), image: world.image.clone(), cut, seed: 1, operations, refuses_state };
    let orders = serde_json::to_string(&orders).unwrap();
    let child = crate::process::command("monitor", &[&orders]).stderr(Stdio::inherit()).spawn().unwrap();
    wait_until("the monitor listens", || world.socket().exists());
    child
}

fn serve_uffd(world: &World, arguments: &[&str]) -> Child {
    let socket = world.socket();
    let common = ["-v", "serve-uffd", "ch1", "--directory", "snapshot", "--cloud-hypervisor", socket.to_str().unwrap()];
    world.command(&[&common, arguments].concat()).spawn().unwrap()
}

fn text(child: Child) -> (std::process::ExitStatus, String) {
    let output = child.wait_with_output().unwrap();
    (output.status, String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}

#[test]
fn p5_cloud_hypervisor_gets_its_pages_on_demand() {
    for arguments in [&[][..], &["--populate"]] {
        let Some(world) = World::new("Cloud Hypervisor", 1024) else { return };
        let cut = 300 * PAGE;
        commit(&world, cut);
        let monitor = start_monitor(&world, cut, 3000, false);
        let _watchdog = Watchdog::new(monitor.id(), PATIENCE);
        let (status, said) = text(serve_uffd(&world, arguments));
        assert!(status.success(), "{said}");
        assert!(said.contains("the VM has all its memory") && !said.contains("ERROR"), "{said}");
        let (status, said) = text(monitor);
        assert!(status.success() && said.contains("guest: ok"), "{said}");
    }
}

#[test]
fn p5_damage_is_not_given_to_cloud_hypervisor() {
    let Some(world) = World::new("Cloud Hypervisor, damaged", 2048) else { return };
    let cut = 300 * PAGE;
    commit(&world, cut);
    let objects = world.damage();
    let monitor = start_monitor(&world, cut, 3000, false);
    let (status, said) = text(serve_uffd(&world, &[]));
    assert_eq!(status.code(), Some(3), "{said}");
    assert!(said.contains("killed process") && said.contains("snapshot/memory-"), "{said}");
    assert!(objects.iter().any(|object| said.contains(object)), "{said}");
    assert_eq!(text(monitor).0.signal(), Some(9));
}

#[test]
fn a_vm_of_cloud_hypervisor_does_not_outlive_its_server_unserved() {
    let Some(world) = World::new("Cloud Hypervisor, killed worker", 1024) else { return };
    let cut = 300 * PAGE;
    commit(&world, cut);
    let monitor = start_monitor(&world, cut, u64::MAX, false);
    let server = serve_uffd(&world, &[]);
    let children = format!("/proc/{0}/task/{0}/children", server.id());
    let mut worker = None;
    wait_until("there is a worker", || {
        worker = std::fs::read_to_string(&children).ok().and_then(|text| text.trim().parse::<i32>().ok());
        worker.is_some()
    });
    std::thread::sleep(Duration::from_millis(300));
    let worker = rustix::process::Pid::from_raw(worker.unwrap()).unwrap();
    rustix::process::kill_process(worker, Signal::KILL).unwrap();
    let (status, said) = text(server);
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("the worker that served it died"), "{said}");
    assert_eq!(text(monitor).0.signal(), Some(9));
}

#[test]
fn a_refusal_of_cloud_hypervisor_is_told() {
    let Some(world) = World::new("Cloud Hypervisor, refusing", 512) else { return };
    let cut = 300 * PAGE;
    commit(&world, cut);
    let monitor = start_monitor(&world, cut, 0, true);
    let (status, said) = text(serve_uffd(&world, &[]));
    assert!(!status.success() && said.contains("refuses the state"), "{said}");
    assert!(text(monitor).0.success());
    let refused = |machine: &str, directory: &str, what: &str| {
        let socket = world.socket();
        let arguments =
            ["serve-uffd", machine, "--cloud-hypervisor", socket.to_str().unwrap(), "--directory", directory];
        let (status, said) = text(world.command(&arguments).spawn().unwrap());
        assert!(!status.success() && said.contains(what), "{said}");
    };
    refused("ch1", "elsewhere", "elsewhere/migration_config.json");
    refused("web1", "", "migration_config.json");
    refused("ch1", "snapshot", "receive-migration");
}
