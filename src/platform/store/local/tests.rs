use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::Kind;
use crate::platform::files::RealFiles;
use crate::platform::store::contract;

fn store(root: &Path) -> LocalStore {
    LocalStore::create(root, Arc::new(RealFiles)).unwrap()
}

fn temporaries(root: &Path) -> usize {
    std::fs::read_dir(root.join("tmp")).map_or(0, Iterator::count)
}

#[test]
fn keeps_the_contract_on_real_files() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("made/with/parents");
    let store: Arc<dyn Store> = Arc::new(store(&root));
    contract::check(&store);
    assert_eq!(store.url(), format!("file://{}", root.canonicalize().unwrap().display()));
    assert_eq!(temporaries(&root), 0);
}

#[test]
fn opens_only_a_directory_that_exists() {
    let dir = tempfile::tempdir().unwrap();
    let open = |name: &str| LocalStore::open(&dir.path().join(name), Arc::new(RealFiles)).err().unwrap().kind();
    std::fs::write(dir.path().join("file"), b"x").unwrap();
    assert_eq!(open("missing"), Kind::NotFound);
    assert_eq!(open("file"), Kind::Usage);
    LocalStore::create(dir.path(), Arc::new(RealFiles)).unwrap();
    LocalStore::open(dir.path(), Arc::new(RealFiles)).unwrap();
}

#[test]
fn a_file_cut_short_under_an_open_handle_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    store.put_if_absent("a/b", &[&[7; 1000]]).unwrap();
    store.get_range("a/b", 0..1000).unwrap();
    std::fs::OpenOptions::new().write(true).open(dir.path().join("a/b")).unwrap().set_len(10).unwrap();
    let error = store.get_range("a/b", 0..1000).unwrap_err();
    assert_eq!(error.kind(), Kind::Damaged);
    assert!(error.to_string().contains("a/b"), "{error}");
}

#[test]
fn a_name_used_again_by_another_process_is_not_read_from_an_old_handle() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (store(dir.path()), store(dir.path()));
    ours.put_if_absent("a", &[b"old"]).unwrap();
    assert_eq!(&ours.get_range("a", 0..3).unwrap()[..], b"old");
    theirs.delete("a").unwrap();
    let mut buffer = [0; 3];
    ours.read_into("a", 0, &mut buffer).unwrap();
    assert_eq!(&buffer, b"old", "who proves what he reads may go on reading");
    assert_eq!(ours.get_range("a", 0..3).unwrap_err().kind(), Kind::NotFound);
    theirs.put_if_absent("a", &[b"new"]).unwrap();
    assert_eq!(&ours.get_range("a", 0..3).unwrap()[..], b"new");
}

#[test]
fn more_objects_than_handles_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    for n in 0..HANDLES * 2 {
        std::fs::write(dir.path().join(format!("{n}")), format!("{n:08}")).unwrap();
    }
    for n in (0..HANDLES * 2).chain(0..HANDLES * 2) {
        assert_eq!(store.get_range(&format!("{n}"), 0..8).unwrap(), format!("{n:08}").as_bytes());
    }
}

#[test]
fn sweeps_only_old_temporaries() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    assert_eq!(store.sweep_temporaries(Duration::ZERO).unwrap(), 0);
    assert!(!dir.path().join("tmp").exists(), "a store in which nothing was written stays as it is");
    store.put_if_absent("a", &[b"x"]).unwrap();
    assert_eq!(store.sweep_temporaries(Duration::ZERO).unwrap(), 0);
    std::fs::write(dir.path().join("tmp/left"), b"x").unwrap();
    assert_eq!(store.sweep_temporaries(Duration::from_secs(3600)).unwrap(), 0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(store.sweep_temporaries(Duration::from_millis(1)).unwrap(), 1);
    assert_eq!(temporaries(dir.path()), 0);
}

#[test]
fn a_streamed_object_whose_name_is_taken_is_a_conflict() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    for len in [10, 3 << 20] {
        let mut writer = store.writer("a").unwrap();
        writer.append(&vec![1; len]).unwrap();
        store.put_if_absent("a", &[b"taken"]).unwrap();
        assert_eq!(writer.finish().unwrap_err().kind(), Kind::Conflict);
        assert_eq!(&store.get("a").unwrap()[..], b"taken");
    }
    assert_eq!(temporaries(dir.path()), 0);
}

/// A file system that was unmounted, or a directory that was moved: what lies at the path then is not the store.
#[test]
fn p1_another_directory_at_the_path_is_not_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let (root, aside) = (dir.path().join("root"), dir.path().join("aside"));
    store(&root).put_if_absent("epochfs.json", &[b"this one"]).unwrap();
    let store = LocalStore::open(&root, Arc::new(RealFiles)).unwrap();
    store.put_if_absent("a", &[b"a"]).unwrap();
    let begun = store.writer("packs/begun").unwrap();
    let move_away = || rustix::fs::rename(&root, &aside).unwrap();
    let refused = |store: &LocalStore| {
        let mut each = |_: ObjectInfo| Ok(true);
        let kinds = [
            store.put_if_absent("b", &[b"b"]).err(),
            store.get("b").err(),
            store.len("b").err(),
            store.list("", None, &mut each).err(),
            store.list_dirs("packs/").err(),
            store.delete("a").err(),
            store.writer("c").err(),
        ];
        assert!(kinds.iter().all(|error| error.as_ref().is_some_and(|error| error.kind() == Kind::Io)), "{kinds:?}");
    };
    move_away();
    refused(&store);
    for content in [None, Some(&b"another"[..])] {
        std::fs::create_dir(&root).unwrap();
        if let Some(content) = content {
            std::fs::write(root.join("epochfs.json"), content).unwrap();
        }
        refused(&store);
        let is_written = std::fs::read_dir(&root).unwrap().count() > usize::from(content.is_some());
        assert!(!is_written);
        std::fs::remove_dir_all(&root).unwrap();
    }
    std::fs::create_dir(&root).unwrap();
    assert!(begun.finish().is_err());
    std::fs::remove_dir_all(&root).unwrap();
    rustix::fs::rename(&aside, &root).unwrap();
    store.put_if_absent("b", &[b"b"]).unwrap();
    // The same store by another number of its directory, as after another mount.
    std::fs::create_dir(dir.path().join("copy")).unwrap();
    for name in ["epochfs.json", "a", "b"] {
        std::fs::copy(root.join(name), dir.path().join("copy").join(name)).unwrap();
    }
    move_away();
    rustix::fs::rename(dir.path().join("copy"), &root).unwrap();
    store.put_if_absent("c", &[b"c"]).unwrap();
    assert_eq!(&store.get("b").unwrap()[..], b"b");
}
