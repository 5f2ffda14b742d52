//! Requests that fail on their way: each ends in success, or in a clear error; never in wrong bytes, and never in two
//! epochs where one was committed.

use std::time::Duration;

use epochfs::platform::clock::Stopwatch;

use crate::proxy::{Fault, Proxy, Rule};
use crate::server::ceph;
use crate::world::{Host, noise};

/// Where the records of a machine are, as a request names them.
const RECORDS: &str = "machines/web1/log/";
const PACKS: &str = "/packs/";

/// A proxy, and a host behind it with a repository that was made before.
fn behind_proxy(host: &Host) -> (Proxy, Host) {
    let proxy = Proxy::new(host.server.endpoint());
    let through = Host::at(&host.server, &host.url, &proxy.url());
    (proxy, through)
}

fn epochs(host: &Host) -> usize {
    host.ok(["log", "web1", "--json"]).json()["epochs"].as_array().unwrap().len()
}

#[test]
fn p2_a_record_whose_acknowledgement_is_lost_is_committed_once() {
    let Some(server) = ceph("lost acknowledgements") else { return };
    let host = Host::new(&server);
    let (proxy, through) = behind_proxy(&host);
    let mut memory = noise(11, 100_000);
    // A lost answer, a cut connection, a busy service that did it all the same: each for one try or several.
    let faults = [
        Fault::Lost,
        Fault::Cut,
        Fault::Answer("503 Slow Down", "SlowDown"),
        Fault::Answer("409 Conflict", "ConditionalRequestConflict"),
    ];
    for (number, fault) in (1..).zip(faults) {
        memory[0] = number;
        proxy.add(Rule::new("PUT", RECORDS, usize::from(number % 2) + 1, fault));
        let committed = through.commit("web1", &memory);
        assert_eq!(committed.code, 0, "{fault:?}: {}", committed.err);
        assert_eq!(epochs(&host), usize::from(number), "{fault:?}");
        assert!(host.memory("web1") == memory, "{fault:?}");
    }
    assert_eq!(proxy.befallen(), 6);
    // Landed, and the answer lost, again and again.
    memory[0] = 100;
    proxy.add(Rule::new("PUT", RECORDS, 4, Fault::Lost));
    assert_eq!(through.commit("web1", &memory).code, 0);
    assert_eq!(epochs(&host), 5);
    host.ok(["verify"]);
}

#[test]
fn p2_a_record_that_arrives_late_is_found_to_be_our_own() {
    let Some(server) = ceph("a record that arrives late") else { return };
    let host = Host::new(&server);
    let (proxy, through) = behind_proxy(&host);
    let memory = noise(12, 50_000);
    // The client gives up after ten seconds and tries again, while the first try lands.
    proxy.add(Rule::new("PUT", RECORDS, 1, Fault::Late(Duration::from_secs(11))));
    let committed = through.commit("web1", &memory);
    assert_eq!(committed.code, 0, "{}", committed.err);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(epochs(&host), 1);
    assert!(host.memory("web1") == memory);
}

#[test]
fn packs_arrive_whole_through_failures() {
    let Some(server) = ceph("packs through failures") else { return };
    let host = Host::new(&server);
    let (proxy, through) = behind_proxy(&host);
    let memory = noise(13, 20 << 20);
    for fault in [Fault::Lost, Fault::Answer("503 Slow Down", "SlowDown"), Fault::Cut] {
        proxy.add(Rule::new("PUT", PACKS, 2, fault));
        proxy.add(Rule::new("POST", PACKS, 1, fault));
    }
    let committed = through.commit("web1", &memory);
    assert_eq!(committed.code, 0, "{}", committed.err);
    assert!(proxy.befallen() >= 6, "{}", proxy.befallen());
    assert!(host.memory("web1") == memory);
    host.ok(["verify"]);
}

#[test]
fn a_busy_service_is_asked_again_and_given_up_in_the_end() {
    let Some(server) = ceph("a busy service") else { return };
    let host = Host::new(&server);
    host.commit("web1", &noise(14, 100_000));
    let (proxy, mut through) = behind_proxy(&host);
    proxy.add(Rule::new("GET", "", 3, Fault::Answer("503 Slow Down", "SlowDown")));
    through.ok(["log", "web1"]);
    proxy.clear();
    proxy.add(Rule::always("", Fault::Answer("503 Slow Down", "SlowDown")));
    through.patience_s = 2;
    let began = Stopwatch::start();
    let given_up = through.run(["log", "web1"]);
    assert_eq!(given_up.code, 1);
    assert!(given_up.err.contains("SlowDown") && given_up.err.contains("busy"), "{}", given_up.err);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let commit = through.commit("web1", &noise(15, 100_000));
    assert_eq!(commit.code, 1);
    proxy.clear();
    assert_eq!(through.commit("web1", &noise(15, 100_000)).code, 0);
}

#[test]
fn p5_half_answers_are_asked_for_again_and_wrong_ones_refused() {
    let Some(server) = ceph("half and wrong answers") else { return };
    let host = Host::new(&server);
    let memory = noise(16, 3 << 20);
    host.commit("web1", &memory);
    let (proxy, through) = behind_proxy(&host);
    proxy.add(Rule::new("GET", PACKS, 2, Fault::Half));
    proxy.add(Rule::new("GET", RECORDS, 1, Fault::Half));
    assert!(through.memory("web1") == memory);
    assert_eq!(proxy.befallen(), 3);
    proxy.clear();
    proxy.add(Rule::new("GET", PACKS, usize::MAX, Fault::Flip));
    let to = through.path("wrong");
    let wrong = through.run(["export", "web1", "--output", to.to_str().unwrap()]);
    assert_eq!(wrong.code, 3, "{}", wrong.err);
    assert!(wrong.err.contains("packs/"), "{}", wrong.err);
    proxy.clear();
    assert!(through.memory("web1") == memory);
}
