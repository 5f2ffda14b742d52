//! P5: whatever is wrong with whatever object, `verify` names it, and no epoch is ever read wrong: its bytes are the
//! right ones, or there is an error.

pub mod repository;

use std::collections::BTreeMap;

use bytes::Bytes;
use epochfs::epoch::{Problem, Verified};
use epochfs_format::{DESCRIPTOR_KEY, is_never_sealed, record_seq};

use crate::support::image::PAGE;
use crate::support::memory::ObjectMap;
use crate::support::{commit, create, memory, open, options};
use repository::{Looked, Sample, for_each, sample};

/// The objects with other bytes under one key.
fn with(objects: &ObjectMap, key: &str, bytes: impl Into<Bytes>) -> ObjectMap {
    let mut objects = objects.clone();
    objects.insert(key.to_owned(), bytes.into());
    objects
}

fn judge(sample: &Sample, key: &str, bytes: Vec<u8>, what: &str) {
    let looked = sample.look(with(&sample.objects, key, bytes));
    sample.judge(&looked, key).unwrap_or_else(|wrong| panic!("{what} of {key}: {wrong}"));
}

#[test]
fn p5_every_flipped_bit_is_reported_and_never_served() {
    let sample = sample();
    let flips: Vec<(&String, usize)> =
        sample.objects.iter().flat_map(|(key, bytes)| (0..bytes.len() * 8).map(move |bit| (key, bit))).collect();
    let started = epochfs::platform::clock::Stopwatch::start();
    for_each(&flips, |(key, bit)| {
        let mut bytes = sample.objects[*key].to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        judge(&sample, key, bytes, &format!("bit {bit}"));
    });
    let (objects, elapsed) = (sample.objects.len(), started.elapsed());
    eprintln!("{} flipped bits in {objects} objects of {} bytes, {elapsed:.1?}", flips.len(), sample.bytes());
}

#[test]
fn p5_every_truncation_and_every_longer_object_is_reported_and_never_served() {
    let sample = sample();
    let cuts: Vec<(&String, usize)> =
        sample.objects.iter().flat_map(|(key, bytes)| (0..bytes.len()).map(move |len| (key, len))).collect();
    for_each(&cuts, |(key, len)| judge(&sample, key, sample.objects[*key][..*len].to_vec(), &format!("{len} bytes")));
    for (key, bytes) in &sample.objects {
        for more in [&[0][..], &[0xff; 40], bytes] {
            judge(&sample, key, [bytes, more].concat(), "more bytes");
        }
        judge(&sample, key, vec![0; bytes.len()], "zeros instead");
    }
    eprintln!("{} truncations", cuts.len());
}

#[test]
fn p5_every_object_in_the_place_of_another_is_reported_and_never_served() {
    let sample = sample();
    let pairs: Vec<(&String, &String)> = sample
        .objects
        .keys()
        .flat_map(|a| sample.objects.keys().map(move |b| (a, b)))
        .filter(|(a, b)| a != b)
        .collect();
    for_each(&pairs, |(key, other)| {
        judge(&sample, key, sample.objects[*other].to_vec(), &format!("{other} in the place"));
    });
    // Records of another repository have the same keys.
    let other = repository::sample();
    let mut foreign = 0;
    for (key, bytes) in other.objects.iter().filter(|(key, _)| key.starts_with("machines/")) {
        judge(&sample, key, bytes.to_vec(), "another repository's");
        foreign += 1;
    }
    eprintln!("{} swapped objects, {foreign} of another repository", pairs.len());
}

/// A record that is longer than what is read of it at first.
#[test]
fn p5_a_long_record_of_another_repository_is_never_served() {
    for pages in [2, 12, 25] {
        let build = |seed| {
            let store = crate::support::memory::MemoryStore::default();
            let content = memory(&crate::crash::noisy_image(seed, pages));
            commit(&create(store.clone()), "web1", &content, options()).unwrap();
            (store.objects(), content)
        };
        let (ours, content) = build(1);
        let (theirs, _) = build(2);
        let key = epochfs_format::record_key("web1", 1);
        let sample = Sample { objects: ours, epochs: [(("web1".to_owned(), 1), content)].into() };
        judge(&sample, &key, theirs[&key].to_vec(), &format!("a record of {} bytes", theirs[&key].len()));
    }
}

/// Without an object, what needs it is an error. Only the end of a log can be missing unnoticed: without its newest
/// record a log is what it was before.
#[test]
fn p5_every_missing_object_is_reported_and_never_served_as_zeros() {
    let sample = sample();
    // Leases come and go.
    for key in sample.objects.keys().filter(|key| !key.starts_with("gc/readers/")) {
        let mut objects = sample.objects.clone();
        objects.remove(key);
        let looked = sample.look(objects);
        if key == DESCRIPTOR_KEY {
            assert_eq!(looked.err().expect("it cannot be opened").kind(), epochfs::Kind::NotFound);
            continue;
        }
        if is_never_sealed(key) {
            assert_eq!(looked.err().expect("no key opens it").kind(), epochfs::Kind::Usage);
            continue;
        }
        let mut looked = looked.unwrap();
        let next = record_seq(key).map(|seq| key.replace(&format!("{seq:016}"), &format!("{:016}", seq + 1)));
        let is_newest = next.is_some_and(|next| !sample.objects.contains_key(&next));
        if is_newest {
            looked
                .readings
                .retain(|_, reading| !matches!(reading, Err(error) if error.kind() == epochfs::Kind::NotFound));
        } else {
            let verified = looked.verified.as_ref().unwrap();
            assert!(!verified.is_whole(), "without {key} all is whole");
        }
        sample.judge_readings(&looked).unwrap_or_else(|wrong| panic!("without {key}: {wrong}"));
    }
}

fn streams(looked: &mut Looked) -> &mut BTreeMap<Vec<u8>, Vec<u8>> {
    looked.readings.get_mut(&("web1".to_owned(), 3)).unwrap().as_mut().unwrap()
}

/// The harness notices wrong bytes, zeros instead of bytes, missing streams, wrong kinds of errors and a `verify` that
/// says nothing or names another object.
#[test]
fn canary_p5_the_judge_notices_wrong_bytes_and_a_silent_verify() {
    let sample = sample();
    let key = sample.objects.keys().find(|key| key.starts_with("packs/")).unwrap();
    let honest = |spoil: &dyn Fn(&mut Looked)| {
        let mut bytes = sample.objects[key].to_vec();
        bytes[100] ^= 1;
        let mut looked = sample.look(with(&sample.objects, key, bytes)).unwrap();
        // A decoder that proves nothing: it reads the damaged epoch as if it were whole.
        let whole = sample.look(sample.objects.clone()).unwrap();
        looked.readings = whole.readings;
        spoil(&mut looked);
        sample.judge(&Ok(looked), key)
    };
    honest(&|_| {}).unwrap();
    let spoilt: [&dyn Fn(&mut Looked); 6] = [
        &|looked| *streams(looked).get_mut(b"memory".as_slice()).unwrap().last_mut().unwrap() ^= 1,
        &|looked| streams(looked).get_mut(b"memory".as_slice()).unwrap()[..PAGE as usize].fill(0),
        &|looked| drop(streams(looked).remove(b"memory".as_slice())),
        &|looked| drop(looked.readings.insert(("web1".to_owned(), 3), Err(epochfs::Error::not_found("lost")))),
        &|looked| looked.verified = Ok(Verified::default()),
        &|looked| {
            let mut verified = Verified::default();
            verified.problems.push(Problem { object: DESCRIPTOR_KEY.into(), problem: "x".into() });
            looked.verified = Ok(verified);
        },
    ];
    for (number, spoil) in spoilt.iter().enumerate() {
        assert!(honest(*spoil).is_err(), "spoilt in way {number}, it passes");
    }
    // And nothing is reported where nothing is wrong.
    let store = open(crate::support::memory::MemoryStore::of(sample.objects.clone())).unwrap();
    assert!(store.verify(&mut |_, _| {}).unwrap().is_whole());
}
