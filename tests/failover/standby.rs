//! Machines that are kept warm on a host: what they need first is there when it takes them over.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::links::has_links;
use crate::server::plain_ceph;
use crate::takeover::{Serving, config};
use crate::world::{Host, World, becomes, can_run, signal};

/// How long each packet of the host takes to the service.
const DISTANCE: Duration = Duration::from_millis(20);

/// How long a phase took of those of the only machine of a report.
fn phase(report: &Value, name: &str) -> f64 {
    let phases = report["machines"][0]["phases"].as_array().unwrap_or_else(|| panic!("{report:#}"));
    let found = phases.iter().find(|phase| phase[0] == name).unwrap_or_else(|| panic!("{name}: {report:#}"));
    found[1].as_f64().unwrap()
}

/// What a host that serves said of what it keeps warm.
fn said(world: &World) -> Vec<Value> {
    let text = std::fs::read_to_string(world.path("b.json")).unwrap_or_default();
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter_map(|line| line.get("warm").cloned()).collect()
}

fn warm_bytes(host: &Host, name: &str) -> u64 {
    let hosts = host.json(&["hosts"]);
    let all = hosts["hosts"].as_array().unwrap();
    all.iter().find(|host| host["name"] == name).and_then(|host| host["warm"]["web1"].as_u64()).unwrap_or_default()
}

#[test]
fn what_is_kept_warm_is_at_hand_and_only_what_changed_is_fetched_for_it() {
    let test = "what_is_kept_warm_is_at_hand";
    if !can_run(test) || !has_links(test) {
        return;
    }
    let Some(server) = plain_ceph(test) else { return };
    let world = World::linked(&server);
    let rules = config(&world);
    let text = std::fs::read_to_string(&rules).unwrap();
    std::fs::write(&rules, format!("{text}[machines.web1]\nwarm = [\"b\"]\n")).unwrap();
    let (mut a, b, c) = (world.mounted("a", "3s"), world.mounted("b", "3s"), world.mounted("c", "3s"));
    for host in [&b, &c] {
        host.link.as_ref().unwrap().delay(DISTANCE);
    }
    let load = ["--guest", "load", "--rate", "2000", "--memory", "32M", "--protect", "web1", "--interval", "1s"];
    let pid = a.guest(&load);
    let serving = Serving::start(&b, &rules, &world.path("b.log"));
    assert!(becomes(Duration::from_secs(40), || said(&world).len() >= 3), "{:?}", said(&world));
    let kept = said(&world);
    let fetched = |at: usize| kept[at]["fetched_bytes"].as_u64().unwrap();
    assert!(kept[0]["bytes"].as_u64().unwrap() > 0 && fetched(0) > 0, "{kept:?}");
    assert_eq!(kept[2]["fetched_bytes_in_all"], fetched(0) + fetched(1) + fetched(2));
    assert!(becomes(Duration::from_secs(10), || warm_bytes(&c, "b") > 0), "other hosts hear of it");
    assert_eq!(warm_bytes(&b, "c"), 0);
    // The newest epoch is there before the machine is taken.
    signal(pid, Signal::KILL);
    let newest = world.store().repository().require(&"web1".into()).unwrap().record.latest_epoch;
    assert!(becomes(Duration::from_secs(20), || said(&world).last().unwrap()["epoch"].as_u64() >= Some(newest)));
    drop(serving);
    let take = |host: &Host| {
        let words = ["failover", "run", "web1", "--config", &rules, "--here", "--fenced", "--yes"];
        let report = host.json(&words);
        assert_eq!(report["machines"][0]["stage"], "running", "{report:#}");
        host.guests().iter().for_each(|pid| signal(*pid, Signal::KILL));
        phase(&report, "working set")
    };
    let warm = take(&b);
    let cold = take(&c);
    eprintln!("20 ms away, the working set is at hand after {warm:.0} ms on a warm host, and {cold:.0} ms on another");
    assert!(warm < cold / 2.0, "{warm} ms warm, {cold} ms cold");
}
