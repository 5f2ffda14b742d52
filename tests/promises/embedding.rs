//! What a program that embeds the store may do wrong, or have go wrong, without an epoch coming out wrong.

use std::ops::Range;

use epochfs::{Attributes, BytesSource, CommitOptions, EpochStore, Error, Kind, PagesSource, Ranges, Source, diff};

/// A source of 10 leaves that fails or panics while it is read.
struct BadSource {
    panics: bool,
}

impl Source for BadSource {
    fn name(&self) -> String {
        "a bad source".into()
    }

    fn len(&self) -> u64 {
        20 << 20
    }

    fn next_data(&self, from: u64) -> epochfs::Result<Option<Range<u64>>> {
        Ok((from < self.len()).then(|| from..self.len()))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> epochfs::Result<()> {
        if offset >= 10 << 20 {
            assert!(!self.panics, "this source panics, as the test wants");
            return Err(Error::new(Kind::Io, "this source fails, as the test wants"));
        }
        buffer.fill(7);
        Ok(())
    }
}

fn store() -> (tempfile::TempDir, EpochStore) {
    let directory = tempfile::tempdir().unwrap();
    let store = EpochStore::create_directory(&directory.path().join("repository")).unwrap();
    (directory, store)
}

#[test]
fn p2_an_epoch_to_which_a_stream_could_not_be_added_is_never_committed() {
    let (_directory, store) = store();
    for panics in [false, true] {
        let mut commit = store.begin_commit("m", CommitOptions::default()).unwrap();
        let source = BadSource { panics };
        let error = commit.add_stream(b"disk", Attributes::default(), &source, None).unwrap_err();
        assert_eq!(error.kind(), Kind::Io, "{error}");
        // What the failed stream stored may never have become durable: other streams must not lean on it.
        commit.add_bytes("memory", vec![7_u8; 4 << 20]).unwrap();
        assert_eq!(commit.finish().unwrap_err().kind(), Kind::Usage);
    }
    assert!(store.repository().machines().unwrap().is_empty(), "nothing was committed");
    assert!(store.verify(&mut |_, _| {}).unwrap().is_whole());
}

/// A sparse image of so many MiB.
fn sparse(mib: u64) -> PagesSource {
    let mut pages = PagesSource::new("s", mib << 20);
    for page in (0..mib << 8).step_by(151) {
        pages.write(page, &[(page % 251) as u8 | 1; 4096]).unwrap();
    }
    pages
}

#[test]
fn the_changed_pages_of_an_epoch_are_those_that_differ_from_its_parent() {
    let (_directory, store) = store();
    let mut number = 0;
    for (before, after) in [(8, 0), (8, 2), (8, 3), (3, 1), (8, 8), (1, 9), (2, 8), (1030, 3), (1030, 1029), (3, 1030)]
    {
        for dirty_only in [false, true] {
            number += 1;
            let machine = format!("m{number}");
            let mut commit = store.begin_commit(&machine, CommitOptions::default()).unwrap();
            commit.add_stream(b"s", Attributes::default(), &sparse(before), None).unwrap();
            commit.finish().unwrap();
            let mut commit = store.begin_commit(&machine, CommitOptions::default()).unwrap();
            let none = Ranges::default();
            commit.add_stream(b"s", Attributes::default(), &sparse(after), dirty_only.then_some(&none)).unwrap();
            let changed = commit.finish().unwrap().counts.changed_pages;
            let epochs = ["1", "2"].map(|epoch| store.epoch(&format!("{machine}@{epoch}").parse().unwrap()).unwrap());
            let differ: u64 = diff(&epochs[0], &epochs[1], false).unwrap().iter().map(|file| file.changed_pages).sum();
            assert_eq!(changed, differ, "from {before} to {after} MiB, dirty only: {dirty_only}");
        }
    }
}

#[test]
fn p6_dirty_ranges_past_the_end_of_everything_are_refused() {
    let (_directory, store) = store();
    let mut commit = store.begin_commit("m", CommitOptions::default()).unwrap();
    let ranges = Ranges::new(vec![99_999_999..100_000_000]);
    let source = BytesSource::new("s", vec![1_u8; 8192]);
    let error = commit.add_stream(b"s", Attributes::default(), &source, Some(&ranges)).unwrap_err();
    assert_eq!(error.kind(), Kind::Usage);
}
