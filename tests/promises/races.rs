//! P3: one writer at a time. Threads with stores of their own race on one repository, as processes and hosts would.

use std::collections::BTreeMap;
use std::sync::{Arc, Barrier, Mutex};

use epochfs::Kind;
use epochfs::epoch::{BytesSource, CommitOptions, EpochStore, Ownership};
use epochfs::platform::files::RealFiles;
use epochfs::platform::random::Seeded;
use epochfs::platform::store::LocalStore;
use epochfs::platform::store::faulty::{Fault, FaultyStore, Rates};
use epochfs::repo::Repository;
use epochfs_format::{Attributes, Body, Owner, Record};

use crate::support::image::{Image, PAGE};
use crate::support::memory::MemoryStore;
use crate::support::{compare, create, is_long, memory, numbered, open, options};

const THREADS: usize = 8;
const ROUNDS: u64 = 16;

/// A directory with a repository, and as many stores of it as are wanted.
struct Shared(tempfile::TempDir);

impl Shared {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Repository::create(Arc::new(LocalStore::create(directory.path(), Arc::new(RealFiles)).unwrap())).unwrap();
        Self(directory)
    }

    fn open(&self) -> EpochStore {
        let store = LocalStore::open(self.0.path(), Arc::new(RealFiles)).unwrap();
        EpochStore::new(Repository::open(Arc::new(store)).unwrap())
    }
}

/// Runs the work on so many threads at once, and returns what each returned.
fn race<T: Send>(threads: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let barrier = Barrier::new(threads);
    let (work, barrier) = (&work, &barrier);
    std::thread::scope(|scope| {
        let racers: Vec<_> = (0..threads)
            .map(|racer| {
                scope.spawn(move || {
                    barrier.wait();
                    work(racer)
                })
            })
            .collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).collect()
    })
}

/// Content that no other attempt has, of a page that all have and one of its own.
fn unique(attempt: u64) -> Image {
    let mut image = Image::zeros(3 * PAGE);
    image.write(0, b"the same for all");
    image.write(2 * PAGE, &attempt.to_le_bytes());
    image.write(2 * PAGE + 8, b"attempt");
    image
}

fn commit_image(store: &EpochStore, machine: &str, image: &Image, options: CommitOptions) -> epochfs::Result<u64> {
    let mut commit = store.begin_commit(machine, options)?;
    commit.add_stream(b"memory", Attributes::default(), &BytesSource::new("x", image.bytes()), None)?;
    commit.finish().map(|committed| committed.epoch)
}

/// Every record of a log, in order.
fn log(store: &EpochStore, machine: &str) -> Vec<Record> {
    let head = store.repository().log_head(&machine.into()).unwrap().unwrap();
    // Replaying it also proves that each record follows the one before.
    store.repository().state(&head, &mut |_, _| {}).unwrap();
    (1..=head.record.seq)
        .map(|seq| store.repository().objects().record(&machine.into(), seq).unwrap().unwrap().0)
        .collect()
}

fn check_whole(store: &EpochStore) {
    let verified = store.verify(&mut |_, _| {}).unwrap();
    assert!(verified.is_whole(), "{:?} {:?}", verified.problems, verified.broken_epochs);
}

#[test]
fn p3_of_several_writers_with_the_same_parent_exactly_one_wins() {
    let shared = Shared::new();
    let stores: Vec<EpochStore> = (0..THREADS).map(|_| shared.open()).collect();
    for round in 0..ROUNDS {
        let outcomes = race(THREADS, |racer| {
            let options = CommitOptions { parent: Some(round), ..options() };
            commit_image(&stores[racer], "web1", &unique(round * 100 + racer as u64), options)
        });
        let mut won = Vec::new();
        for (racer, outcome) in outcomes.iter().enumerate() {
            match outcome {
                Ok(epoch) => won.push((racer, *epoch)),
                Err(error) => assert_eq!(error.kind(), Kind::Conflict, "{error}"),
            }
        }
        let &[(winner, epoch)] = won.as_slice() else { panic!("round {round}: {won:?} won") };
        assert_eq!(epoch, round + 1);
        let streams = memory(&unique(round * 100 + winner as u64));
        for store in &stores {
            compare(&store.epoch(&numbered("web1", epoch)).unwrap(), &streams).unwrap();
        }
    }
    assert_eq!(log(&stores[0], "web1").len() as u64, ROUNDS);
    check_whole(&stores[0]);
}

#[test]
fn p3_writers_that_repeat_all_come_through_and_nothing_is_lost() {
    let shared = Shared::new();
    let stores: Vec<EpochStore> = (0..THREADS).map(|_| shared.open()).collect();
    let committed = race(THREADS, |racer| {
        let mut epochs = Vec::new();
        for round in 0..ROUNDS {
            let attempt = round * 100 + racer as u64;
            loop {
                match commit_image(&stores[racer], "web1", &unique(attempt), options()) {
                    Ok(epoch) => break epochs.push((epoch, attempt)),
                    Err(error) => assert_eq!(error.kind(), Kind::Conflict, "{error}"),
                }
            }
        }
        epochs
    });
    let all: BTreeMap<u64, u64> = committed.into_iter().flatten().collect();
    assert_eq!(all.len() as u64, THREADS as u64 * ROUNDS);
    assert!(all.keys().copied().eq(1..=THREADS as u64 * ROUNDS));
    let store = shared.open();
    for (epoch, attempt) in all {
        compare(&store.epoch(&numbered("web1", epoch)).unwrap(), &memory(&unique(attempt))).unwrap();
    }
    check_whole(&store);
}

#[test]
fn p3_writers_of_different_machines_do_not_hinder_each_other() {
    let shared = Shared::new();
    let state = tempfile::tempdir().unwrap();
    let stores: Vec<EpochStore> = (0..THREADS).map(|_| shared.open().with_state(state.path())).collect();
    race(THREADS, |racer| {
        let name = format!("m{racer}");
        for round in 0..ROUNDS {
            let image = unique(round * 100 + racer as u64);
            assert_eq!(commit_image(&stores[racer], &name, &image, options()).unwrap(), round + 1);
        }
    });
    let store = shared.open();
    for racer in 0..THREADS {
        for round in 0..ROUNDS {
            let epoch = store.epoch(&numbered(&format!("m{racer}"), round + 1)).unwrap();
            compare(&epoch, &memory(&unique(round * 100 + racer as u64))).unwrap();
        }
    }
    check_whole(&store);
}

#[test]
fn p3_a_name_goes_to_exactly_one_of_several_who_want_it() {
    let shared = Shared::new();
    let stores: Vec<EpochStore> = (0..THREADS).map(|_| shared.open()).collect();
    commit_image(&stores[0], "web1", &unique(1), options()).unwrap();
    let from = stores[0].epoch(&numbered("web1", 1)).unwrap();
    for round in 0..ROUNDS {
        let name = format!("new{}", round / 2);
        // Every other round the name was used before, and its machine removed.
        let outcomes = race(THREADS, |racer| match racer % 2 {
            0 => stores[racer].create_machine(&name),
            _ => stores[racer].clone_epoch(from.record(), &name),
        });
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1, "round {round}");
        for error in outcomes.into_iter().filter_map(Result::err) {
            assert_eq!(error.kind(), Kind::Conflict, "{error}");
        }
        let removed = race(THREADS, |racer| stores[racer].remove_machine(&name.as_str().into(), false));
        assert_eq!(removed.iter().filter(|outcome| outcome.is_ok()).count(), 1, "round {round}");
        for error in removed.into_iter().filter_map(Result::err) {
            assert_eq!(error.kind(), Kind::NotFound, "{error}");
        }
    }
    check_whole(&stores[0]);
}

#[test]
fn p2_a_tag_goes_to_one_of_several_who_want_it_for_different_epochs() {
    let shared = Shared::new();
    let stores: Vec<EpochStore> = (0..THREADS).map(|_| shared.open()).collect();
    for racer in 0..THREADS as u64 {
        commit_image(&stores[0], "web1", &unique(racer), options()).unwrap();
    }
    for round in 0..ROUNDS {
        let (machine, tag): (Arc<str>, _) = ("web1".into(), format!("tag{round}"));
        let outcomes = race(THREADS, |racer| stores[racer].tag(&machine, racer as u64 + 1, &tag, false));
        let won: Vec<usize> = (0..THREADS).filter(|racer| outcomes[*racer].is_ok()).collect();
        let &[winner] = won.as_slice() else { panic!("round {round}: {won:?} won") };
        for error in outcomes.into_iter().filter_map(Result::err) {
            assert_eq!(error.kind(), Kind::Conflict, "{error}");
        }
        assert_eq!(stores[0].repository().tagged_record(&machine, &tag).unwrap().seq, winner as u64 + 1);
    }
}

#[test]
fn p2_tags_drops_and_commits_at_once_all_count() {
    let shared = Shared::new();
    let stores: Vec<EpochStore> = (0..THREADS).map(|_| shared.open()).collect();
    let machine: Arc<str> = "web1".into();
    for round in 0..ROUNDS {
        commit_image(&stores[0], "web1", &unique(round), options()).unwrap();
    }
    let committed = Mutex::new(Vec::new());
    race(THREADS, |racer| {
        let store = &stores[racer];
        for round in 1..=ROUNDS {
            match racer {
                // Two drop every epoch that is not a fourth, each its half.
                0 | 1 => {
                    if round % 4 != 0 && round % 2 == racer as u64 {
                        store.drop_epochs(&machine, &[round].into()).unwrap();
                    }
                }
                2 | 3 => {
                    let attempt = 1000 + round * 10 + racer as u64;
                    while let Err(error) = commit_image(store, "web1", &unique(attempt), options())
                        .map(|epoch| committed.lock().unwrap().push((epoch, attempt)))
                    {
                        assert_eq!(error.kind(), Kind::Conflict, "{error}");
                    }
                }
                // The others tag the epochs that stay.
                _ => {
                    let epoch = (round / 4 * 4 + 4).min(ROUNDS);
                    store.tag(&machine, epoch, &format!("r{racer}-{round}"), false).unwrap();
                }
            }
        }
    });
    let store = shared.open();
    let head = store.repository().require(&machine).unwrap();
    let state = store.repository().state(&head, &mut |_, _| {}).unwrap();
    let committed = committed.into_inner().unwrap();
    let kept = (1..=ROUNDS).filter(|epoch| epoch % 4 == 0);
    let expected: BTreeMap<u64, u64> = kept.map(|epoch| (epoch, epoch - 1)).chain(committed).collect();
    assert!(state.epochs.keys().eq(expected.keys()), "{:?}", state.epochs.keys());
    for (epoch, attempt) in expected {
        compare(&store.epoch(&numbered("web1", epoch)).unwrap(), &memory(&unique(attempt))).unwrap();
    }
    for racer in 4..THREADS {
        for round in 1..ROUNDS {
            let tag = format!("r{racer}-{round}");
            assert_eq!(state.list.tags.get(&tag), Some(&(round / 4 * 4 + 4)), "{tag}");
            assert_eq!(store.repository().tagged_record(&machine, &tag).unwrap().seq, round / 4 * 4 + 4);
        }
    }
    check_whole(&store);
}

fn owner(host: u8) -> Owner {
    Owner { host: [host; 16], name: format!("host{host}"), lease_ms: 1000 }
}

fn with_term(ownership: &Ownership) -> CommitOptions {
    CommitOptions { term: Some(ownership.term), ..options() }
}

#[test]
fn p3_an_owner_whose_term_is_over_never_commits_again_and_learns_why() {
    let store = create(MemoryStore::default());
    let machine = store.create_machine("web1").unwrap().record.machine;
    let first = store.own(&machine, owner(1), false).unwrap();
    commit_image(&store, "web1", &unique(1), with_term(&first)).unwrap();
    assert_eq!(store.own(&machine, owner(2), false).unwrap_err().kind(), Kind::Conflict);
    assert_eq!(commit_image(&store, "web1", &unique(2), options()).unwrap_err().kind(), Kind::Conflict);
    assert_eq!(store.remove_machine(&machine, false).unwrap_err().kind(), Kind::Conflict);

    // A commit in flight when the machine is taken over.
    let mut in_flight = store.begin_commit("web1", with_term(&first)).unwrap();
    in_flight.add_stream(b"memory", Attributes::default(), &BytesSource::new("x", *b"x"), None).unwrap();
    let second = store.own(&machine, owner(2), true).unwrap();
    assert!(second.term > first.term);
    assert_eq!(in_flight.finish().unwrap_err().kind(), Kind::Fenced);
    assert_eq!(commit_image(&store, "web1", &unique(3), with_term(&first)).unwrap_err().kind(), Kind::Fenced);
    assert_eq!(store.release(&first).unwrap_err().kind(), Kind::Fenced);
    let take_over = CommitOptions { take_over: true, ..with_term(&first) };
    assert_eq!(commit_image(&store, "web1", &unique(3), take_over).unwrap_err().kind(), Kind::Fenced);
    commit_image(&store, "web1", &unique(4), with_term(&second)).unwrap();

    // Without a term, by force: that ends the owner's.
    let take_over = CommitOptions { take_over: true, ..options() };
    commit_image(&store, "web1", &unique(5), take_over).unwrap();
    assert_eq!(commit_image(&store, "web1", &unique(6), with_term(&second)).unwrap_err().kind(), Kind::Fenced);
    commit_image(&store, "web1", &unique(7), options()).unwrap();

    // Given up, and owned by the next without force; removed, and made again.
    let third = store.own(&machine, owner(3), false).unwrap();
    store.release(&third).unwrap();
    let fourth = store.own(&machine, owner(4), false).unwrap();
    assert_eq!(commit_image(&store, "web1", &unique(8), with_term(&third)).unwrap_err().kind(), Kind::Fenced);
    store.remove_machine(&machine, true).unwrap();
    assert_eq!(commit_image(&store, "web1", &unique(9), with_term(&fourth)).unwrap_err().kind(), Kind::Fenced);
    store.create_machine("web1").unwrap();
    for stale in [&first, &second, &third, &fourth] {
        assert_eq!(commit_image(&store, "web1", &unique(9), with_term(stale)).unwrap_err().kind(), Kind::Fenced);
    }
}

/// Whether a log keeps the promise: the term never falls, it rises with each new owner, and every commit that was
/// acknowledged under a term lies where that term was in force.
fn check_terms(records: &[Record], acknowledged: &[(u64, u64)]) -> Result<(), String> {
    let mut term = 0;
    for record in records {
        crate::must!(record.term >= term, "the term falls to {} in record {}", record.term, record.seq);
        let begins = record.body == Body::Term && record.owner.is_some();
        crate::must!(record.term == term || term == 0 || begins, "record {} begins a term", record.seq);
        crate::must!(!begins || record.term > term, "two owners have the term {term}");
        term = record.term;
    }
    for (epoch, term) in acknowledged {
        let record = &records[*epoch as usize - 1];
        crate::must!(matches!(record.body, Body::Commit(_)), "acknowledged epoch {epoch} is no commit");
        crate::must!(record.term == *term, "epoch {epoch} was committed in term {}, not {term}", record.term);
    }
    Ok(())
}

#[test]
fn p3_hosts_that_take_a_machine_over_from_each_other_never_commit_in_another_term() {
    for seed in 0..if is_long() { 60 } else { 4 } {
        let shared = Shared::new();
        let machine = shared.open().create_machine("web1").unwrap().record.machine;
        let acknowledged = race(6, |racer| {
            let (store, mut seeded) = (shared.open(), Seeded::of(seed, racer as u64));
            let mut own: Option<Ownership> = None;
            let mut acknowledged = Vec::new();
            for step in 0..60 {
                match (&own, seeded.below(10)) {
                    (None, _) | (_, 0) => match store.own(&machine, owner(racer as u8), seeded.chance(700)) {
                        Ok(new) => own = Some(new),
                        Err(error) => assert_eq!(error.kind(), Kind::Conflict, "{error}"),
                    },
                    (Some(held), 1) => {
                        match store.release(held) {
                            Ok(()) => {}
                            Err(error) => assert_eq!(error.kind(), Kind::Fenced, "{error}"),
                        }
                        own = None;
                    }
                    (Some(held), _) => {
                        match commit_image(&store, "web1", &unique(racer as u64 * 1000 + step), with_term(held)) {
                            Ok(epoch) => acknowledged.push((epoch, held.term)),
                            Err(error) if error.kind() == Kind::Fenced => own = None,
                            Err(error) => panic!("an owner alone in its term: {error}"),
                        }
                    }
                }
            }
            acknowledged
        });
        let acknowledged: Vec<(u64, u64)> = acknowledged.into_iter().flatten().collect();
        let records = log(&shared.open(), "web1");
        let commits = records.iter().filter(|record| matches!(record.body, Body::Commit(_))).count();
        assert_eq!(commits, acknowledged.len(), "seed {seed}");
        check_terms(&records, &acknowledged).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        // The canary: a commit that slipped in behind the end of its term.
        let mut wrong = records.clone();
        let at = wrong.iter().rposition(|record| matches!(record.body, Body::Commit(_)) && record.term > 2).unwrap();
        wrong[at].term -= 1;
        assert!(check_terms(&wrong, &acknowledged).is_err());
    }
}

/// Counts in the log what an attempt is there.
fn times(records: &[Record], attempt: &str) -> usize {
    records.iter().filter(|record| matches!(&record.body, Body::Commit(commit) if commit.message == attempt)).count()
}

/// Some attempts on a store with faults; each tells what it was told.
fn attempts(store: &EpochStore, racer: usize, count: u64) -> Vec<(String, epochfs::Result<u64>)> {
    (0..count)
        .map(|round| {
            let attempt = format!("{racer}-{round}");
            // Every fourth is too large for its record, and comes with a pack.
            let mut image = unique(round * 100 + racer as u64);
            if round % 4 == 0 {
                image = crate::crash::noisy_image(round * 100 + racer as u64, 40);
            }
            let options = CommitOptions { message: attempt.clone(), ..options() };
            (attempt, commit_image(store, "web1", &image, options))
        })
        .collect()
}

#[test]
fn p3_a_store_that_fails_after_the_effect_leads_to_no_double_and_no_lost_commit() {
    let rates = Rates { error_before: 30, error_after: 60, exists_after: 120, delay: 20, ..Rates::default() };
    let (mut landed_unknown, mut told) = (0, BTreeMap::<String, u64>::new());
    for seed in 0..if is_long() { 500 } else { 24 } {
        let inner = MemoryStore::default();
        let sound = create(inner.clone());
        let outcomes = race(3, |racer| {
            let faulty = FaultyStore::new(Arc::new(inner.clone()), Seeded::of(seed, racer as u64).next(), rates);
            faulty.set_enabled(false);
            let store = EpochStore::new(Repository::open(Arc::new(faulty.clone())).unwrap());
            faulty.set_enabled(true);
            attempts(&store, racer, 16)
        });
        let records = log(&sound, "web1");
        for (attempt, outcome) in outcomes.into_iter().flatten() {
            let there = times(&records, &attempt);
            let kind = outcome.as_ref().map_or_else(|error| format!("{:?}", error.kind()), |_| "Ok".into());
            *told.entry(kind).or_default() += 1;
            match outcome {
                Ok(epoch) => {
                    assert_eq!(there, 1, "seed {seed}: {attempt} was acknowledged");
                    let is_it = times(&records[epoch as usize - 1..epoch as usize], &attempt);
                    assert_eq!(is_it, 1, "seed {seed}: {attempt} is not epoch {epoch}");
                }
                Err(error) => match error.kind() {
                    Kind::Conflict => assert_eq!(there, 0, "seed {seed}: {attempt} failed for certain: {error}"),
                    Kind::Io => {
                        assert!(there <= 1, "seed {seed}: {attempt} is there twice");
                        landed_unknown += there;
                    }
                    _ => panic!("seed {seed}: {attempt}: {:?}: {error}", error.kind()),
                },
            }
        }
        check_whole(&sound);
    }
    eprintln!("told {told:?}; {landed_unknown} commits landed that were told to have failed");
    assert!(landed_unknown > 0 && told["Ok"] > 100 && told["Conflict"] > 10);
}

/// A store that repeats by itself may answer that the name is taken by its own first try.
#[test]
fn p3_a_put_that_is_answered_by_its_own_success_is_a_success() {
    for pages in [1, 40] {
        let calls = {
            let inner = MemoryStore::default();
            create(inner.clone());
            let faulty = FaultyStore::new(Arc::new(inner), 0, Rates::default());
            let store = EpochStore::new(Repository::open(Arc::new(faulty.clone())).unwrap());
            commit_image(&store, "web1", &crate::crash::noisy_image(1, pages), options()).unwrap();
            faulty.calls()
        };
        for call in 0..calls {
            let inner = MemoryStore::default();
            let sound = create(inner.clone());
            let faulty = FaultyStore::new(Arc::new(inner), 0, Rates::default());
            let store = EpochStore::new(Repository::open(Arc::new(faulty.clone())).unwrap());
            faulty.plan(call, Fault::ExistsAfter);
            let image = crate::crash::noisy_image(1, pages);
            commit_image(&store, "web1", &image, options()).unwrap_or_else(|error| panic!("call {call}: {error}"));
            compare(&sound.epoch(&numbered("web1", 1)).unwrap(), &memory(&image)).unwrap();
        }
    }
}

/// The harness notices a store of which two can win the same name.
#[test]
fn canary_p3_a_store_that_lets_two_win_is_noticed() {
    let inner = MemoryStore::overwriting();
    create(inner.clone());
    let stores: Vec<EpochStore> = (0..2).map(|_| open(inner.clone()).unwrap()).collect();
    let begun: Vec<_> = stores.iter().map(|store| store.begin_commit("web1", options()).unwrap()).collect();
    let won = begun.into_iter().filter_map(|commit| commit.finish().ok()).count();
    assert_eq!(won, 2, "two were told that they won, which every race above takes for a failure");
}
