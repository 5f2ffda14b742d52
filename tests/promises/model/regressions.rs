//! Failures that the proofs found, each shrunk to what it takes.

use epochfs::Kind;
use epochfs::epoch::{BytesSource, PagesSource, Ranges};
use epochfs_format::{Attributes, EntryKind, ManifestEntry, Owner};

use crate::support::image::{Image, ImageSource, LEAF, PAGE};
use crate::support::memory::MemoryStore;
use crate::support::{commit, commit_dirty, compare, create, latest, memory, options};

/// P1: the nodes put on top of a tree that grows were looked for in a pack that was not written yet.
#[test]
fn p1_a_stream_that_grows_past_a_level_of_its_tree_keeps_its_pages() {
    for (before, after) in [(LEAF, LEAF + 1), (1, 1 << 30), (LEAF, (1 << 30) + 1), (1 << 30, 1 << 40), (PAGE, 1 << 48)]
    {
        let store = create(MemoryStore::default());
        let mut image = Image::zeros(before);
        image.write(0, b"x");
        commit(&store, "web1", &memory(&image), options()).unwrap();
        image.resize(after);
        image.write(after - 1, b"y");
        let dirty = Ranges::new(vec![after - 1..after]);
        commit_dirty(&store, "web1", &ImageSource::new(image.clone()), &dirty).unwrap();
        compare(&store.epoch(&latest("web1")).unwrap(), &memory(&image)).unwrap();
        // And with nothing dirty at all.
        image.resize(after * 1024);
        commit_dirty(&store, "web1", &ImageSource::new(image.clone()), &Ranges::default()).unwrap();
        compare(&store.epoch(&latest("web1")).unwrap(), &memory(&image)).unwrap();
        assert!(store.verify(&mut |_, _| {}).unwrap().is_whole());
    }
}

/// P6: the last page of an image that was cut was read as zeros from a source that holds dirty pages only.
#[test]
fn p6_a_stream_that_is_cut_keeps_a_last_page_that_is_not_dirty() {
    for after in [PAGE, PAGE + 1, 2 * PAGE - 1, LEAF, LEAF + 5] {
        let store = create(MemoryStore::default());
        let mut image = Image::of(&vec![7; (LEAF + 3 * PAGE) as usize]);
        commit(&store, "web1", &memory(&image), options()).unwrap();
        image.resize(after);
        let mut source = PagesSource::new("pages", after);
        source.write(0, &[9; PAGE as usize]).unwrap();
        image.put_page(0, [9; PAGE as usize]);
        commit_dirty(&store, "web1", &source, &source.dirty()).unwrap();
        compare(&store.epoch(&latest("web1")).unwrap(), &memory(&image)).unwrap();
    }
}

/// P5: past the end of a stream, but within its last page, a range that runs backwards was told to be data.
#[test]
fn p5_there_is_no_data_past_the_end_of_a_stream() {
    let store = create(MemoryStore::default());
    commit(&store, "web1", &memory(&Image::of(&[1; 10])), options()).unwrap();
    let reader = store.epoch(&latest("web1")).unwrap().stream(b"memory").unwrap();
    assert_eq!(reader.next_data(9).unwrap(), Some(9..10));
    for from in [10, 11, PAGE - 1, PAGE, u64::MAX] {
        assert_eq!(reader.next_data(from).unwrap(), None, "{from}");
    }
}

/// P2: a tag could be given to an epoch that does not exist.
#[test]
fn p2_only_an_epoch_that_exists_can_be_tagged() {
    let store = create(MemoryStore::default());
    let machine = "web1".into();
    commit(&store, "web1", &memory(&Image::of(&[1])), options()).unwrap();
    commit(&store, "web1", &memory(&Image::of(&[2])), options()).unwrap();
    store.drop_epochs(&machine, &[1].into()).unwrap();
    for epoch in [0, 1, 3, 4] {
        for force in [false, true] {
            assert_eq!(store.tag(&machine, epoch, "golden", force).unwrap_err().kind(), Kind::NotFound, "{epoch}");
        }
    }
    store.tag(&machine, 2, "golden", false).unwrap();
}

/// P3: a commit in flight while its owner gave the machine up made it owned again.
#[test]
fn p3_a_commit_behind_a_release_does_not_own_the_machine_again() {
    let store = create(MemoryStore::default());
    let machine = store.create_machine("web1").unwrap().record.machine;
    let owner = Owner { host: [1; 16], name: "host1".into(), lease_ms: 1000 };
    let ownership = store.own(&machine, owner, false).unwrap();
    let owned = epochfs::epoch::CommitOptions { term: Some(ownership.term), ..options() };
    let mut commit = store.begin_commit("web1", owned).unwrap();
    commit.add_stream(b"memory", Attributes::default(), &BytesSource::new("x", *b"x"), None).unwrap();
    store.release(&ownership).unwrap();
    let finished = commit.finish();
    let head = store.repository().require(&machine).unwrap();
    assert_eq!(head.record.owner, None, "finished: {:?}", finished.map(|committed| committed.epoch));
}

/// P2: an epoch must be one that can be mounted and exported: no file lies below a file, or below a link that leads
/// elsewhere.
#[test]
fn p2_no_stream_lies_below_a_file_or_a_link() {
    let store = create(MemoryStore::default());
    let link = EntryKind::Symlink(b"/etc".to_vec());
    for above in [None, Some(link)] {
        let mut commit = store.begin_commit("web1", options()).unwrap();
        let add = |commit: &mut epochfs::epoch::CommitBuilder, path: &[u8]| {
            commit.add_stream(path, Attributes::default(), &BytesSource::new("x", *b"x"), None)
        };
        match above {
            None => add(&mut commit, b"a").unwrap(),
            Some(kind) => commit
                .add_entry(ManifestEntry { path: b"a".to_vec(), attributes: Attributes::default(), kind })
                .unwrap(),
        }
        add(&mut commit, b"a-b").unwrap();
        let below = add(&mut commit, b"a/b");
        let refused = below.and_then(|()| commit.finish().map(|_| ())).unwrap_err();
        assert_eq!(refused.kind(), Kind::Usage, "{refused}");
    }
}

/// No panic on any input: a length near the largest number.
#[test]
fn p5_a_length_that_no_file_has_is_refused() {
    let store = create(MemoryStore::default());
    for length in [u64::MAX, 1 << 63] {
        let mut source = PagesSource::new("pages", length);
        source.write((length - 1) / PAGE, &[0; PAGE as usize]).unwrap();
        let mut commit = store.begin_commit("web1", options()).unwrap();
        let refused = commit.add_stream(b"memory", Attributes::default(), &source, None).unwrap_err();
        assert_eq!(refused.kind(), Kind::Usage, "{refused}");
    }
    let mut image = Image::zeros(i64::MAX as u64);
    image.write(i64::MAX as u64 - 1, b"z");
    commit(&store, "web1", &memory(&image), options()).unwrap();
    compare(&store.epoch(&latest("web1")).unwrap(), &memory(&image)).unwrap();
}
