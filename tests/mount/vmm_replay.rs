//! What Firecracker and Cloud Hypervisor do with files, operation by operation, on the mount and across commits. An epoch
//! must hold what the VMM wrote, also where it wrote onto a writable clone of the epoch before.
//!
//! `vmm_replay_qemu.rs` does the same for QEMU.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use epochfs::platform::random::Seeded;
use rustix::io::Errno;

use crate::place::Place;
use crate::raw::Mapping;
use crate::support::{PAGE, fails, noise, same, same_file};

/// Guest memory in two slots, as Firecracker has it around the hole below 4 GiB: the file has them one behind the other.
const SLOTS: [Range<usize>; 2] = [0..3 << 20, 3 << 20..8 << 20];
const MEMORY_LEN: usize = 8 << 20;

/// A guest: what its memory should be, and the pages that it changed since it was last asked.
pub struct Guest {
    pub memory: Vec<u8>,
    pub dirty: BTreeSet<usize>,
    seeded: Seeded,
}

impl Guest {
    /// A guest whose memory is mostly zeros, as real ones are.
    pub fn new(seed: u64, len: usize) -> Self {
        let mut guest = Self { memory: vec![0; len], dirty: BTreeSet::new(), seeded: Seeded::new(seed) };
        guest.run(len / PAGE / 4);
        guest
    }

    /// Lets it change so many pages: new content, old content again, or zeros.
    pub fn run(&mut self, pages: usize) {
        for _ in 0..pages {
            let page = self.seeded.below((self.memory.len() / PAGE) as u64) as usize;
            let bytes = match self.seeded.below(8) {
                0 => vec![0; PAGE],
                1 => noise(self.seeded.below(5), PAGE),
                _ => noise(self.seeded.next(), PAGE),
            };
            self.memory[page * PAGE..][..PAGE].copy_from_slice(&bytes);
            self.dirty.insert(page);
        }
    }

    /// Runs of pages that changed.
    pub fn dirty_runs(&mut self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for page in std::mem::take(&mut self.dirty) {
            match runs.last_mut() {
                Some(run) if run.end == page => run.end += 1,
                _ => runs.push(page..page + 1),
            }
        }
        runs
    }

    /// Does to a mapped image what the guest did to its memory.
    pub fn store_into(&mut self, map: &Mapping) {
        for run in self.dirty_runs() {
            for page in run {
                map.write(page * PAGE, &self.memory[page * PAGE..][..PAGE]).unwrap();
            }
        }
    }
}

/// Firecracker's state file: truncated, written, a checksum behind it, synced.
fn firecracker_state(path: &Path, state: &[u8]) {
    let mut file = File::options().write(true).create(true).truncate(true).open(path).unwrap();
    file.write_all(state).unwrap();
    file.write_all(&(state.len() as u64 ^ 0x9e37_79b9_7f4a_7c15).to_le_bytes()).unwrap();
    file.sync_all().unwrap();
}

/// Opens the memory file as Firecracker does: never truncated by opening, emptied first where it has another size.
fn firecracker_open(path: &Path) -> File {
    let before = fs::metadata(path).ok();
    let file = File::options().write(true).create(true).truncate(false).open(path).unwrap();
    if before.is_some_and(|before| before.len() != MEMORY_LEN as u64) {
        file.set_len(0).unwrap();
    }
    file.set_len(MEMORY_LEN as u64).unwrap();
    file
}

/// Writes one slot after the other from where the guest's memory is mapped, zero pages too.
fn firecracker_full(path: &Path, memory: &Mapping) {
    let file = firecracker_open(path);
    for slot in SLOTS {
        let mut done = slot.start;
        while done < slot.end {
            done += memory.write_once(&file, done..slot.end).unwrap();
        }
    }
    file.sync_all().unwrap();
}

/// Writes the runs of dirty pages, each where the position was sought to.
fn firecracker_diff(path: &Path, guest: &mut Guest) {
    let mut file = firecracker_open(path);
    for run in guest.dirty_runs() {
        let (start, end) = (run.start * PAGE, run.end * PAGE);
        let now = file.stream_position().unwrap();
        file.seek(SeekFrom::Current(start as i64 - now as i64)).unwrap();
        file.write_all(&guest.memory[start..end]).unwrap();
    }
    file.sync_all().unwrap();
}

/// Loads: each slot mapped privately at its place from where it lies in the file.
fn firecracker_load(path: &Path) -> Mapping {
    let file = File::open(path).unwrap();
    assert!(file.metadata().unwrap().len() >= MEMORY_LEN as u64);
    let memory = Mapping::anonymous(MEMORY_LEN).unwrap();
    for slot in SLOTS {
        memory.put_private(slot.clone(), &file, slot.start as u64).unwrap();
    }
    memory
}

fn anonymous(bytes: &[u8]) -> Mapping {
    let memory = Mapping::anonymous(bytes.len()).unwrap();
    memory.write(0, bytes).unwrap();
    memory
}

#[test]
fn firecracker_full_and_diff_snapshots_are_what_the_guest_was() {
    let Some(mut place) = Place::new("firecracker_full_and_diff_snapshots") else { return };
    let (memory, state) = (place.live().join("memory"), place.live().join("vmstate"));
    let mut guest = Guest::new(1, MEMORY_LEN);
    let mut epochs = Vec::new();
    for round in 0..6_u64 {
        let state_bytes = noise(round, 30_000 + round as usize * 17);
        firecracker_state(&state, &state_bytes);
        if round % 3 == 0 {
            guest.dirty.clear();
            firecracker_full(&memory, &anonymous(&guest.memory));
        } else {
            firecracker_diff(&memory, &mut guest);
        }
        let epoch = place.commit(&format!("round{round}")).unwrap();
        epochs.push((epoch, guest.memory.clone(), state_bytes));
        guest.run(300);
        if round == 3 {
            place.restart();
        }
    }
    for (epoch, memory, state) in &epochs {
        same_file(&epoch.join("memory"), memory).unwrap();
        let mut found = Vec::new();
        File::open(epoch.join("vmstate")).unwrap().take(10 << 20).read_to_end(&mut found).unwrap();
        assert!(found.len() == state.len() + 8 && found.starts_with(state));
        // Each is loaded, and what its guest writes then stays with that guest.
        let loaded = firecracker_load(&epoch.join("memory"));
        loaded.write(5 * PAGE, b"written by the restored guest").unwrap();
        same("loaded", &loaded.bytes(6 * PAGE..MEMORY_LEN).unwrap(), &memory[6 * PAGE..]).unwrap();
        same_file(&epoch.join("memory"), memory).unwrap();
    }
    place.finish();
}

#[test]
fn firecracker_a_diff_onto_a_writable_clone_is_a_complete_image() {
    let Some(place) = Place::new("firecracker_a_diff_onto_a_writable_clone") else { return };
    let mut guest = Guest::new(2, MEMORY_LEN);
    firecracker_full(&place.live().join("memory"), &anonymous(&guest.memory));
    guest.dirty.clear();
    let first = place.commit("first").unwrap();
    let first_memory = guest.memory.clone();
    let clone = place.clone_epoch("first", "web2").unwrap();
    for round in 0..3 {
        guest.run(200);
        firecracker_diff(&clone.join("memory"), &mut guest);
        let epoch = place.commit_machine("web2", &format!("round{round}")).unwrap();
        same_file(&epoch.join("memory"), &guest.memory).unwrap();
    }
    // Neither the epoch nor its machine noticed.
    same_file(&first.join("memory"), &first_memory).unwrap();
    same_file(&place.live().join("memory"), &first_memory).unwrap();
    place.finish();
}

#[test]
fn firecracker_a_memory_file_of_another_size_is_emptied_first() {
    let Some(place) = Place::new("firecracker_a_memory_file_of_another_size") else { return };
    let path = place.live().join("memory");
    for (round, len) in [MEMORY_LEN + 5 * PAGE, MEMORY_LEN / 2, 100].into_iter().enumerate() {
        fs::write(&path, vec![0x55; len]).unwrap();
        place.commit(&format!("before{round}")).unwrap();
        let file = firecracker_open(&path);
        drop(file);
        same_file(&path, &vec![0; MEMORY_LEN]).unwrap();
        let mut guest = Guest::new(round as u64, MEMORY_LEN);
        firecracker_diff(&path, &mut guest);
        let epoch = place.commit(&format!("after{round}")).unwrap();
        same_file(&epoch.join("memory"), &guest.memory).unwrap();
    }
    place.finish();
}

/// The guest's memory is the file that is written: each page that is read to be written lies in the same page cache.
#[test]
fn firecracker_a_full_snapshot_onto_the_file_it_is_mapped_from_ends_and_is_right() {
    let Some(place) = Place::new("firecracker_a_full_snapshot_onto_its_own_file") else { return };
    let path = place.live().join("memory");
    let mut guest = Guest::new(4, MEMORY_LEN);
    firecracker_full(&path, &anonymous(&guest.memory));
    for round in 0..3 {
        let loaded = firecracker_load(&path);
        guest.run(400);
        guest.store_into(&loaded);
        firecracker_full(&path, &loaded);
        let epoch = place.commit(&format!("round{round}")).unwrap();
        same_file(&epoch.join("memory"), &guest.memory).unwrap();
        same("the guest", &loaded.bytes(0..MEMORY_LEN).unwrap(), &guest.memory).unwrap();
    }
    place.finish();
}

/// Cloud Hypervisor's files: each must be new, and is written without looking at how much of it was.
fn cloud_hypervisor_json(path: &Path, text: &[u8]) {
    let mut file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    assert_eq!(file.write(text).unwrap(), text.len(), "a write that is cut short is never repeated");
}

/// `memory-ranges`: as long as the memory, and the data of it in pieces of 1 MiB.
fn cloud_hypervisor_memory_ranges(path: &Path, memory: &File, is_shared: bool) {
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    let len = memory.metadata().unwrap().len();
    file.set_len(len).unwrap();
    let mut at = 0;
    while at < len {
        let end = if is_shared {
            match rustix::fs::seek(memory, rustix::fs::SeekFrom::Data(at)) {
                Ok(data) => at = data,
                Err(Errno::NXIO) => break,
                Err(error) => panic!("SEEK_DATA: {error}"),
            }
            rustix::fs::seek(memory, rustix::fs::SeekFrom::Hole(at)).unwrap()
        } else {
            len
        };
        while at < end {
            let mut piece = vec![0; (end - at).min(1 << 20) as usize];
            memory.read_exact_at(&mut piece, at).unwrap();
            file.write_all_at(&piece, at).unwrap();
            at += piece.len() as u64;
        }
    }
}

#[test]
fn cloud_hypervisor_snapshots_into_fresh_directories_are_what_the_guest_was() {
    let Some(mut place) = Place::new("cloud_hypervisor_snapshots_into_fresh_directories") else { return };
    let mut guest = Guest::new(5, MEMORY_LEN);
    let memory: File = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into();
    memory.set_len(MEMORY_LEN as u64).unwrap();
    let map = Mapping::shared(&memory, 0, MEMORY_LEN).unwrap();
    let mut epochs = Vec::new();
    for round in 0..4_usize {
        guest.store_into(&map);
        let directory = place.live().join(format!("snapshot{round}"));
        fs::create_dir(&directory).unwrap();
        let (config, state) = (noise(round as u64, 3_000), noise(100 + round as u64, 200_000 + round));
        cloud_hypervisor_json(&directory.join("config.json"), &config);
        cloud_hypervisor_json(&directory.join("state.json"), &state);
        cloud_hypervisor_memory_ranges(&directory.join("memory-ranges"), &memory, round % 2 == 0);
        // Nothing was synced: write(2) has reached the daemon, and that is enough for a commit.
        let epoch = place.commit(&format!("round{round}")).unwrap();
        let again = File::options().read(true).write(true).create_new(true).open(directory.join("config.json"));
        fails("a second snapshot there", again, &[Errno::EXIST]);
        epochs.push((epoch.join(format!("snapshot{round}")), guest.memory.clone(), config, state));
        // The agent removes the one before.
        if round > 0 {
            fs::remove_dir_all(place.live().join(format!("snapshot{}", round - 1))).unwrap();
        }
        guest.run(200);
        if round == 2 {
            place.restart();
        }
    }
    for (directory, memory, config, state) in &epochs {
        same_file(&directory.join("config.json"), config).unwrap();
        same_file(&directory.join("state.json"), state).unwrap();
        same_file(&directory.join("memory-ranges"), memory).unwrap();
    }
    place.finish();
}

/// `--memory-zone file=...,shared=on`: the guest's memory is the file. Restored with a private map of the epoch.
#[test]
fn cloud_hypervisor_a_shared_memory_zone_is_committed_in_place_and_restored_lazily() {
    let Some(mut place) = Place::new("cloud_hypervisor_a_shared_memory_zone") else { return };
    let path = place.live().join("mem0");
    let mut guest = Guest::new(6, MEMORY_LEN);
    if place.is_mount() {
        assert_eq!(rustix::fs::statfs(place.live()).unwrap().f_bsize, 4096, "zones are aligned to it");
    }
    let mut epochs = Vec::new();
    for boot in 0..2 {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
        file.set_len(MEMORY_LEN as u64).unwrap();
        assert!(file.metadata().unwrap().nlink() >= 1, "a zone without a name would not be saved in place");
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let map = Mapping::new(&file, 0, MEMORY_LEN, libc::PROT_READ | libc::PROT_WRITE, flags).unwrap();
        drop(file);
        // The guest of the second boot finds what the first one left.
        let mut known = guest.memory.clone();
        if boot == 0 {
            known.fill(0);
            guest.store_into(&map);
        } else {
            same("after the restart", &map.bytes(0..MEMORY_LEN).unwrap(), &known).unwrap();
        }
        for round in 0..3 {
            guest.run(150);
            guest.store_into(&map);
            // The agent syncs by a descriptor of its own.
            File::open(&path).unwrap().sync_all().unwrap();
            let epoch = place.commit(&format!("boot{boot}-round{round}")).unwrap();
            epochs.push((epoch.join("mem0"), guest.memory.clone()));
        }
        guest.run(100);
        guest.store_into(&map);
        drop(map);
        place.restart();
    }
    for (path, memory) in &epochs {
        same_file(path, memory).unwrap();
        let file = File::open(path).unwrap();
        let map = Mapping::private(&file, 0, MEMORY_LEN).unwrap();
        map.write(PAGE, &noise(9, 3 * PAGE)).unwrap();
        same("restored", &map.bytes(4 * PAGE..MEMORY_LEN).unwrap(), &memory[4 * PAGE..]).unwrap();
        same_file(path, memory).unwrap();
    }
    same_file(&path, &guest.memory).unwrap();
    place.finish();
}

/// A VMM whose writes are lost must be noticed by the comparisons above.
#[test]
fn canary_vmm_a_snapshot_that_lacks_a_page_is_noticed() {
    let place = Place::plain("canary_vmm");
    let path = place.live().join("memory");
    let mut guest = Guest::new(7, MEMORY_LEN);
    firecracker_full(&path, &anonymous(&guest.memory));
    guest.dirty.clear();
    guest.run(50);
    // The first dirty page is forgotten.
    let first = *guest.dirty.iter().next().unwrap();
    guest.memory[first * PAGE] ^= 1;
    guest.dirty.remove(&first);
    firecracker_diff(&path, &mut guest);
    assert!(same_file(&place.commit("lacking").unwrap().join("memory"), &guest.memory).is_err());
}
