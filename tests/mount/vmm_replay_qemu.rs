//! What QEMU does with files, operation by operation, on the mount and across commits.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate, fstatfs};
use rustix::io::Errno;

use crate::place::Place;
use crate::raw::{Mapping, lock, mkstemp};
use crate::support::{Aligned, PAGE, fails, noise, same, same_file};
use crate::vmm_replay::Guest;

const MEMORY_LEN: usize = 8 << 20;

/// Advice that QEMU gives for guest memory: whether it is taken decides nothing.
fn advise_as_qemu(map: &Mapping) {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_DONTFORK, libc::MADV_MERGEABLE] {
        let _ = map.advise(0..map.len(), advice);
    }
}

/// `memory-backend-file` on a path: opened, or made and opened, as long as wanted, mapped.
fn memory_backend(path: &Path, share: bool) -> Mapping {
    let file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) => {
            assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
            File::options().read(true).write(true).create_new(true).mode(0o644).open(path).unwrap()
        }
    };
    let status = file.metadata().unwrap();
    let end = (&file).seek(SeekFrom::End(0)).unwrap();
    assert_eq!(end, status.len());
    fstatfs(&file).unwrap();
    if end == 0 {
        file.set_len(MEMORY_LEN as u64).unwrap();
    }
    assert!(end == 0 || end >= MEMORY_LEN as u64, "QEMU refuses a file that is too small");
    let map = if share { Mapping::shared(&file, 0, MEMORY_LEN) } else { Mapping::private(&file, 0, MEMORY_LEN) };
    let map = map.unwrap();
    advise_as_qemu(&map);
    map
}

/// `migrate file:`: made or emptied, 32 KiB a call, never synced.
fn migrate_to(path: &Path, state: &[u8]) {
    let mut file = File::options().write(true).create(true).truncate(false).mode(0o600).open(path).unwrap();
    file.set_len(0).unwrap();
    for piece in state.chunks(32 << 10) {
        let parts = piece.split_at(piece.len() / 3);
        let vectors = [std::io::IoSlice::new(parts.0), std::io::IoSlice::new(parts.1)];
        assert_eq!(file.write_vectored(&vectors).unwrap(), piece.len());
    }
}

#[test]
fn qemu_in_place_rounds_are_what_the_guest_was_and_the_guest_runs_on() {
    let Some(place) = Place::new("qemu_in_place_rounds") else { return };
    let (memory, state) = (place.live().join("memory"), place.live().join("vmstate"));
    let map = memory_backend(&memory, true);
    assert_eq!(fs::metadata(&memory).unwrap().permissions().mode() & 0o777 & !0o022, 0o644 & !0o022);
    let mut guest = Guest::new(11, MEMORY_LEN);
    let mut epochs = Vec::new();
    // Held by the agent, not by QEMU.
    let agent = File::options().read(true).write(true).open(&memory).unwrap();
    for round in 0..8_u64 {
        guest.run(250);
        guest.store_into(&map);
        let state_bytes = noise(round, 200_000 + 1_000 * (round as usize % 3));
        migrate_to(&state, &state_bytes);
        agent.sync_all().unwrap();
        let epoch = place.commit(&format!("round{round}")).unwrap();
        epochs.push((epoch, guest.memory.clone(), state_bytes));
        assert_eq!(fs::metadata(&state).unwrap().mode() & 0o777, 0o600);
    }
    for (epoch, memory, state) in &epochs {
        same_file(&epoch.join("memory"), memory).unwrap();
        same_file(&epoch.join("vmstate"), state).unwrap();
    }
    same("the guest", &map.bytes(0..MEMORY_LEN).unwrap(), &guest.memory).unwrap();
    drop(map);
    // Restored lazily: read-only, mapped for writing.
    let (epoch, expected, _) = epochs.last().unwrap();
    let file = File::open(epoch.join("memory")).unwrap();
    let map = Mapping::private(&file, 0, MEMORY_LEN).unwrap();
    advise_as_qemu(&map);
    map.write(7 * PAGE + 5, b"a restored guest goes on").unwrap();
    same("restored", &map.bytes(8 * PAGE..MEMORY_LEN).unwrap(), &expected[8 * PAGE..]).unwrap();
    same_file(&epoch.join("memory"), expected).unwrap();
    drop((map, file, agent));
    place.finish();
}

#[test]
fn qemu_goes_on_in_place_on_a_writable_clone() {
    let Some(place) = Place::new("qemu_goes_on_in_place_on_a_writable_clone") else { return };
    let mut guest = Guest::new(12, MEMORY_LEN);
    let map = memory_backend(&place.live().join("memory"), true);
    guest.store_into(&map);
    map.sync_all().unwrap();
    let first = place.commit("first").unwrap();
    let before = guest.memory.clone();
    drop(map);
    let clone = place.clone_epoch("first", "web2").unwrap();
    // An existing file is not resized, and keeps what it has.
    let map = memory_backend(&clone.join("memory"), true);
    same("the clone", &map.bytes(0..MEMORY_LEN).unwrap(), &before).unwrap();
    for round in 0..3 {
        guest.run(100);
        guest.store_into(&map);
        map.sync_all().unwrap();
        let epoch = place.commit_machine("web2", &format!("round{round}")).unwrap();
        same_file(&epoch.join("memory"), &guest.memory).unwrap();
    }
    same_file(&first.join("memory"), &before).unwrap();
    same_file(&place.live().join("memory"), &before).unwrap();
    drop(map);
    place.finish();
}

#[test]
fn qemu_memory_in_a_file_without_a_name_works_and_is_in_no_epoch() {
    let Some(place) = Place::new("qemu_memory_in_a_file_without_a_name") else { return };
    let mut guest = Guest::new(13, MEMORY_LEN);
    let (file, path) = mkstemp(&place.live().join("qemu_back_mem.XXXXXX")).unwrap();
    assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
    fs::remove_file(&path).unwrap();
    file.set_len(MEMORY_LEN as u64).unwrap();
    let map = Mapping::shared(&file, 0, MEMORY_LEN).unwrap();
    drop(file);
    advise_as_qemu(&map);
    for round in 0..3 {
        guest.run(200);
        guest.store_into(&map);
        map.sync_all().unwrap();
        let epoch = place.commit(&format!("round{round}")).unwrap();
        assert_eq!(fs::read_dir(epoch).unwrap().count(), 0, "a file without a name is in no epoch");
        same("the guest", &map.bytes(0..MEMORY_LEN).unwrap(), &guest.memory).unwrap();
    }
    drop(map);
    assert_eq!(fs::read_dir(place.live()).unwrap().count(), 0);
    place.finish();
}

#[test]
fn qemu_an_existing_file_keeps_its_length_and_a_private_map_its_stores() {
    let Some(place) = Place::new("qemu_an_existing_file_keeps_its_length") else { return };
    let path = place.live().join("memory");
    let content = noise(14, MEMORY_LEN + 3 * PAGE);
    fs::write(&path, &content).unwrap();
    // share=off opens for writing all the same.
    let map = memory_backend(&path, false);
    map.write(0, &noise(15, 20 * PAGE)).unwrap();
    same_file(&place.commit("private").unwrap().join("memory"), &content).unwrap();
    drop(map);
    let map = memory_backend(&path, true);
    map.advise(0..MEMORY_LEN, libc::MADV_POPULATE_WRITE).unwrap();
    map.write(PAGE, &noise(16, PAGE)).unwrap();
    map.sync_all().unwrap();
    let mut expected = content;
    expected[PAGE..2 * PAGE].copy_from_slice(&noise(16, PAGE));
    same_file(&place.commit("shared").unwrap().join("memory"), &expected).unwrap();
    // discard-data=on punches all of the memory when QEMU ends.
    map.advise(0..MEMORY_LEN, libc::MADV_REMOVE).unwrap();
    expected[..MEMORY_LEN].fill(0);
    same("the map", &map.bytes(0..MEMORY_LEN).unwrap(), &expected[..MEMORY_LEN]).unwrap();
    same_file(&place.commit("discarded").unwrap().join("memory"), &expected).unwrap();
    drop(map);
    place.finish();
}

/// mapped-ram with direct-io: pages at fixed places, by several channels, from the last to the first; the bitmaps last.
fn mapped_ram(path: &Path, guest: &Guest, direct: bool) -> Vec<u8> {
    const PAGES_AT: usize = 1 << 20;
    let pages = MEMORY_LEN / PAGE;
    let mut expected = vec![0; PAGES_AT + MEMORY_LEN];
    let main = File::options().write(true).create(true).truncate(false).mode(0o600).open(path).unwrap();
    main.set_len(0).unwrap();
    let header = [b"QEVM".as_slice(), &3_u32.to_be_bytes(), &noise(21, 60)].concat();
    main.write_all_at(&header, 0).unwrap();
    expected[..header.len()].copy_from_slice(&header);
    std::thread::scope(|scope| {
        for channel in 0..3 {
            let expected_flags = if direct { libc::O_DIRECT } else { 0 };
            let file = File::options().write(true).custom_flags(expected_flags).open(path).unwrap();
            scope.spawn(move || {
                for page in (0..pages).rev().filter(|page| page % 3 == channel) {
                    let bytes = &guest.memory[page * PAGE..][..PAGE];
                    if bytes.iter().any(|byte| *byte != 0) {
                        file.write_all_at(&Aligned::of(bytes), (PAGES_AT + page * PAGE) as u64).unwrap();
                    }
                }
            });
        }
    });
    expected[PAGES_AT..].copy_from_slice(&guest.memory);
    let mut bitmap = vec![0_u8; pages / 8];
    for page in 0..pages {
        if guest.memory[page * PAGE..][..PAGE].iter().any(|byte| *byte != 0) {
            bitmap[page / 8] |= 1 << (page % 8);
        }
    }
    main.write_all_at(&bitmap, 4096 - 28).unwrap();
    expected[4096 - 28..][..bitmap.len()].copy_from_slice(&bitmap);
    let end = noise(22, 40_000);
    main.write_all_at(&end, expected.len() as u64).unwrap();
    expected.extend_from_slice(&end);
    expected
}

#[test]
fn qemu_mapped_ram_by_several_descending_direct_channels_is_what_the_guest_was() {
    let Some(place) = Place::new("qemu_mapped_ram") else { return };
    let mut guest = Guest::new(17, MEMORY_LEN);
    let mut epochs = Vec::new();
    for round in 0..4 {
        let expected = mapped_ram(&place.live().join("vm.state"), &guest, round % 2 == 0);
        let epoch = place.commit(&format!("round{round}")).unwrap();
        epochs.push((epoch.join("vm.state"), expected));
        guest.run(300);
    }
    for (path, expected) in &epochs {
        same_file(path, expected).unwrap();
        // Restored eagerly, in part directly.
        let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap();
        let mut bytes = Aligned::new(MEMORY_LEN);
        direct.read_exact_at(&mut bytes, 1 << 20).unwrap();
        same("restored", &bytes, &expected[1 << 20..][..MEMORY_LEN]).unwrap();
    }
    place.finish();
}

#[test]
fn qemu_disks_are_locked_probed_zeroed_and_discarded() {
    let Some(place) = Place::new("qemu_disks") else { return };
    let path = place.live().join("disk0");
    let mut expected = noise(18, 4 << 20);
    fs::write(&path, &expected).unwrap();
    let open = |flags: i32| File::options().read(true).write(true).custom_flags(flags).open(&path).unwrap();
    let (disk, other) = (open(libc::O_DIRECT), open(0));
    // Shared locks tell what each process does; an exclusive one asks whether anybody does it.
    for byte in [100, 101, 103, 201] {
        lock(&disk, libc::F_RDLCK, byte, 1).unwrap();
        lock(&other, libc::F_RDLCK, byte, 1).unwrap();
        fails("an exclusive lock", lock(&other, libc::F_WRLCK, byte, 1), &[Errno::AGAIN, Errno::ACCESS]);
        lock(&other, libc::F_UNLCK, byte, 1).unwrap();
        lock(&disk, libc::F_UNLCK, byte, 1).unwrap();
        lock(&other, libc::F_WRLCK, byte, 1).unwrap();
        lock(&other, libc::F_UNLCK, byte, 1).unwrap();
    }
    // The probe of the alignment: refused or right, never wrong.
    let mut byte = Aligned::new(1);
    match disk.read_at(&mut byte, 0) {
        Ok(count) => assert_eq!((count, byte[0]), (1, expected[0])),
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EINVAL)),
    }
    for round in 0..6_usize {
        let at = round * 600_000 / PAGE * PAGE;
        disk.write_all_at(&Aligned::of(&noise(round as u64, 64 << 10)), at as u64).unwrap();
        expected[at..at + (64 << 10)].copy_from_slice(&noise(round as u64, 64 << 10));
        let (zeroed, discarded) = (at + (100 << 10), at + (200 << 10));
        fallocate(disk.as_fd(), FallocateFlags::ZERO_RANGE, zeroed as u64, 5_000).unwrap();
        expected[zeroed..zeroed + 5_000].fill(0);
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(disk.as_fd(), punch, discarded as u64, 70_000).unwrap();
        expected[discarded..discarded + 70_000].fill(0);
        disk.sync_data().unwrap();
        let epoch = place.commit(&format!("round{round}")).unwrap();
        same_file(&epoch.join("disk0"), &expected).unwrap();
        same_file(&path, &expected).unwrap();
        // qemu-img map finds the hole that was punched.
        let hole = rustix::fs::seek(&other, rustix::fs::SeekFrom::Hole(discarded as u64 + 2 * PAGE as u64)).unwrap();
        assert_eq!(hole, discarded as u64 + 2 * PAGE as u64);
    }
    drop((disk, other));
    place.finish();
}
