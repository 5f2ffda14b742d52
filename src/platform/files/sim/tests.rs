use super::*;

fn path(text: &str) -> &Path {
    Path::new(text)
}

fn read(files: &SimFiles, name: &str) -> Option<Vec<u8>> {
    let file = files.open(path(name)).ok()?;
    let mut bytes = vec![0; usize::try_from(file.len().unwrap()).unwrap()];
    assert_eq!(file.read_at(0, &mut bytes).unwrap(), bytes.len());
    Some(bytes)
}

#[test]
fn behaves_like_a_file_system() {
    let files = SimFiles::new(0);
    let kind = |result: io::Result<()>| result.unwrap_err().kind();
    files.create_dir(path("/d")).unwrap();
    let file = files.create_new(path("/d/a"), false).unwrap();
    file.write_at(2, b"xy").unwrap();
    assert_eq!(read(&files, "/d/a").unwrap(), b"\0\0xy");
    files.hard_link(path("/d/a"), path("/d/b")).unwrap();
    assert_eq!(file.links().unwrap(), 2);
    assert_eq!(kind(files.hard_link(path("/d/a"), path("/d/b"))), io::ErrorKind::AlreadyExists);
    assert_eq!(kind(files.hard_link(path("/d/a"), path("/no/b"))), io::ErrorKind::NotFound);
    assert_eq!(kind(files.hard_link(path("/d/a"), path("/d/b/c"))), io::ErrorKind::NotADirectory);
    assert_eq!(kind(files.create_dir(path("/d"))), io::ErrorKind::AlreadyExists);
    assert_eq!(kind(files.create_dir(path("/"))), io::ErrorKind::AlreadyExists);
    assert_eq!(kind(files.remove_file(path("/d"))), io::ErrorKind::IsADirectory);
    assert_eq!(files.open(path("/d")).err().unwrap().kind(), io::ErrorKind::IsADirectory);
    files.remove_file(path("/d/a")).unwrap();
    assert_eq!(files.read_dir(path("/d")).unwrap(), [Entry { name: "b".into(), is_dir: false }]);
    assert_eq!(files.read_dir(path("/")).unwrap(), [Entry { name: "d".into(), is_dir: true }]);
    assert_eq!((files.len(path("/d")).unwrap(), files.len(path("/d/b")).unwrap()), (None, Some(4)));
    assert_eq!(files.canonicalize(path("d/./b")).unwrap(), path("/d/b"));
    file.set_len(1).unwrap();
    assert_eq!(read(&files, "/d/b").unwrap(), b"\0");
}

#[test]
fn a_direct_file_insists_on_its_alignment() {
    let files = SimFiles::new(0);
    let file = files.create_new(path("/a"), true).unwrap();
    let memory = vec![1_u8; 3 * DIRECT_ALIGNMENT];
    let start = memory.as_ptr().addr().next_multiple_of(DIRECT_ALIGNMENT) - memory.as_ptr().addr();
    let aligned = &memory[start..start + DIRECT_ALIGNMENT];
    file.write_at(4096, aligned).unwrap();
    assert!(file.write_at(1, aligned).is_err());
    assert!(file.write_at(0, &aligned[..100]).is_err());
    assert!(file.write_at(0, &memory[start + 1..start + 1 + DIRECT_ALIGNMENT]).is_err());
    files.set_direct(Direct::RefusedAtCreate);
    assert_eq!(files.create_new(path("/b"), true).err().unwrap().kind(), io::ErrorKind::InvalidInput);
    assert!(read(&files, "/b").is_none());
}

#[test]
fn what_was_synced_survives_and_the_rest_may_or_may_not() {
    let files = SimFiles::new(0);
    let file = files.create_new(path("/a"), false).unwrap();
    file.write_at(0, &[1; 2048]).unwrap();
    file.sync().unwrap();
    files.sync_dir(path("/")).unwrap();
    file.write_at(0, &[2; 4096]).unwrap();
    files.create_new(path("/b"), false).unwrap();
    let end = files.log_len();
    assert_eq!(read(&files.crash_state(end, Loss::Everything), "/a").unwrap(), [1; 2048]);
    assert_eq!(read(&files.crash_state(end, Loss::Nothing), "/a").unwrap(), [2; 4096]);
    let (mut torn, mut short, mut named) = (0, 0, 0);
    for (loss, state) in files.crash_states(end, 1, 64) {
        let bytes = read(&state, "/a").unwrap();
        // Each sector is the old one, the new one, or a hole.
        assert!(bytes.chunks(512).all(|sector| sector.iter().all(|byte| *byte == sector[0])), "{loss:?}");
        assert!(bytes[..2048].iter().all(|&byte| byte == 1 || byte == 2));
        torn += usize::from(bytes.contains(&1) && bytes.contains(&2));
        short += usize::from(bytes.len() < 4096);
        named += usize::from(read(&state, "/b").is_some());
        // A crashed file system is one to go on with.
        let again = state.create_new(path("/c"), false).unwrap();
        again.sync().unwrap();
        assert!(read(&state.crash_state(state.log_len(), Loss::Everything), "/a").unwrap() == bytes);
    }
    assert!(torn > 10 && short > 5 && (10..60).contains(&named), "torn {torn}, short {short}, named {named}");
    // Before the sync of the directory, the name may be missing though the data is durable.
    assert!(read(&files.crash_state(3, Loss::Everything), "/a").is_none());
}

#[test]
fn a_synced_directory_is_lost_with_its_own_name() {
    let files = SimFiles::new(0);
    files.create_dir(path("/d")).unwrap();
    files.create_new(path("/d/a"), false).unwrap();
    files.sync_dir(path("/d")).unwrap();
    assert!(read(&files.crash_state(3, Loss::Everything), "/d/a").is_none());
    files.sync_dir(path("/")).unwrap();
    assert!(read(&files.crash_state(4, Loss::Everything), "/d/a").is_some());
}

#[test]
fn a_seed_gives_the_same_state_each_time() {
    let files = SimFiles::new(0);
    let file = files.create_new(path("/a"), false).unwrap();
    files.sync_dir(path("/")).unwrap();
    file.write_at(0, &[1; 100_000]).unwrap();
    let bytes = |seed| read(&files.crash_state(3, Loss::Some(seed)), "/a").unwrap();
    assert!((0..8).all(|seed| bytes(seed) == bytes(seed)));
    assert!((1..8).any(|seed| bytes(seed) != bytes(0)));
}

#[test]
fn the_call_that_was_chosen_fails() {
    let once = |errno| Failure { errno, lasting: false, after_effect: false };
    let files = SimFiles::new(0);
    files.fail_call(0, once(Errno::NOSPC));
    files.fail_call(2, Failure { after_effect: true, ..once(Errno::IO) });
    assert_eq!(files.create_dir(path("/d")).unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert!(files.read_dir(path("/")).unwrap().is_empty());
    assert_eq!(files.create_dir(path("/d")).unwrap_err().raw_os_error(), Some(Errno::IO.raw_os_error()));
    assert_eq!(files.read_dir(path("/")).unwrap().len(), 1);
    files.fail_call(4, Failure { lasting: true, ..once(Errno::NOSPC) });
    let file = || files.create_new(path("/a"), false);
    assert!(file().is_err() && file().is_err());
    assert!(files.read_dir(path("/")).is_ok());
    files.heal();
    file().unwrap();
    assert_eq!(files.calls(), 8);
}

#[test]
fn a_failed_sync_may_lose_data_that_a_later_one_does_not_bring_back() {
    let mut lost = 0;
    for seed in 0..64 {
        let files = SimFiles::new(seed);
        let file = files.create_new(path("/a"), false).unwrap();
        files.sync_dir(path("/")).unwrap();
        file.write_at(0, &[1; 512]).unwrap();
        files.fail_call(files.calls(), Failure { errno: Errno::IO, lasting: false, after_effect: false });
        assert!(file.sync().is_err());
        file.sync().unwrap();
        lost += u32::from(read(&files.crash_state(files.log_len(), Loss::Everything), "/a").unwrap().is_empty());
    }
    assert!((16..48).contains(&lost), "{lost} of 64");
}
