//! Planning a failover from a file, and simulating one: neither needs a repository.

use serde_json::{Value, json};

use crate::support::World;

const GIB: u64 = 1 << 30;

fn cluster() -> Value {
    let host = |id: &str, free: u64| {
        json!({"id": id, "name": format!("{id}.example"), "memory": 64 * GIB, "memory_free": free * GIB, "cpus": 8,
               "cpu_features": ["avx2"], "location": ["z1", id]})
    };
    let need = |machine: &str, memory: u64, priority: i32| json!({"machine": machine, "epoch": 7, "memory": memory * GIB, "cpus": 2, "priority": priority});
    let mut web = need("web1", 4, 1);
    web["after"] = json!(["db1"]);
    let mut modern = need("modern", 1, 0);
    modern["cpu_features"] = json!(["avx2", "amx"]);
    json!({
        "hosts": [host("h1", 20), host("h2", 40)],
        "needs": [web, need("db1", 30, 0), need("huge", 100, 5), modern],
        "settings": {"memory_headroom": 0.0},
    })
}

#[test]
fn a_plan_is_shown_and_nothing_is_done() {
    let world = World::empty();
    let file = world.file("cluster.json", cluster().to_string());
    let file = file.to_str().unwrap();
    let ran = world.ok(["failover", "plan", "--from", file]);
    for text in [
        "h2.example",
        "no host has 100.0 GiB of memory left: h1.example has the most, 16.0 GiB",
        "no processor has the features it was saved with: h1.example lacks amx",
        "2 placed, 2 without a host: no plan places more",
    ] {
        assert!(ran.stdout.contains(text), "no {text:?} in {}", ran.stdout);
    }
    let plan = world.json(["failover", "plan", "--from", file]);
    let of = |machine: &str| {
        let all = plan["placements"].as_array().unwrap();
        all.iter().find(|one| one["machine"] == machine).cloned().unwrap_or_else(|| panic!("{plan:#}"))
    };
    assert_eq!((of("db1")["host"].as_str(), of("db1")["wave"].as_u64()), (Some("h2"), Some(0)));
    assert_eq!((of("web1")["host"].as_str(), of("web1")["wave"].as_u64()), (Some("h1"), Some(1)));
    assert_eq!(plan["unplaced"][0]["machine"], "huge");
    assert_eq!(plan["unplaced"][0]["why"]["kind"], "memory");
    assert_eq!(plan["unplaced"][1]["why"]["missing"], json!(["amx"]));
    assert_eq!(plan, world.json(["failover", "plan", "--from", file]));
    assert!(!world.repository().exists() && !world.state().exists());
}

#[test]
fn what_a_plan_placed_stays_in_the_next() {
    let world = World::empty();
    let mut cluster = cluster();
    let file = world.file("cluster.json", cluster.to_string());
    let plan = world.json(["failover", "plan", "--from", file.to_str().unwrap()]);
    cluster["placed"] = plan["placements"].clone();
    cluster["hosts"].as_array_mut().unwrap().remove(1);
    let file = world.file("again.json", cluster.to_string());
    let again = world.json(["failover", "plan", "--from", file.to_str().unwrap()]);
    assert_eq!(again["placements"][0]["machine"], "web1", "{again:#}");
    assert_eq!(again["placements"][0]["is_kept"], true);
    assert_eq!(again["unplaced"].as_array().unwrap().len(), 3);
}

#[test]
fn a_document_that_is_none_is_explained() {
    let world = World::empty();
    let missing = world.run(["failover", "plan", "--from", "/no/such/file"]);
    missing.code(5).says("/no/such/file");
    for (text, says) in [
        ("", "EOF"),
        ("[]", "cluster.json"),
        ("{\"hosts\": [{\"id\": \"h1\"}], \"needs\": []}", "memory"),
        ("{\"hosts\": [], \"needs\": [], \"host\": []}", "unknown field"),
        ("{\"hosts\": [], \"needs\": [{\"machine\": \"a\", \"epoch\": 1, \"memory\": -1, \"cpus\": 1}]}", "-1"),
    ] {
        let file = world.file("cluster.json", text);
        world.run(["failover", "plan", "--from", file.to_str().unwrap()]).code(2).says(says).says("next: ");
    }
}

#[test]
fn strange_numbers_are_planned_all_the_same() {
    let world = World::empty();
    let most = u64::MAX;
    let host = json!({"id": "h", "memory": most, "memory_free": most, "cpus": u32::MAX, "cpus_used": u32::MAX});
    let need = |machine: &str, memory: u64| json!({"machine": machine, "epoch": most, "memory": memory, "cpus": 0});
    for headroom in [-1e300, 0.0, 0.5, 1e300] {
        let document = json!({
            "hosts": [host, host], "needs": [need("a", most), need("b", most), need("a", 0), need("", 1)],
            "settings": {"memory_headroom": headroom, "cpu_overcommit": -headroom},
        });
        let file = world.file("cluster.json", document.to_string());
        let plan = world.json(["failover", "plan", "--from", file.to_str().unwrap()]);
        let count = |list: &str| plan[list].as_array().unwrap().len();
        assert_eq!(count("placements") + count("unplaced"), 4, "{plan:#}");
    }
}

#[test]
fn a_simulated_failure_says_how_long_it_takes() {
    let world = World::empty();
    let words = ["failover", "simulate", "--hosts", "50", "--machines", "2000", "--hosts-per-rack", "5"];
    let told = world.json(words);
    assert_eq!((told["lost_hosts"].as_u64(), told["lost_machines"].as_u64()), (Some(5), Some(200)));
    let recoveries = told["recoveries"].as_array().unwrap();
    let last = |at: usize| recoveries[at]["to_100_percent_s"].as_f64().unwrap();
    assert!(recoveries.len() == 4 && last(0) > last(1) && last(1) > last(3), "{told:#}");
    assert_eq!(told["recoveries"], world.json(words)["recoveries"]);
    let ran = world.ok(words);
    assert!(ran.stdout.contains("5 of 50 hosts are lost, and 200 of 2000 machines"), "{}", ran.stdout);
    for wrong in [["--failed-racks", "10"], ["--load", "2"], ["--latency", "fast"], ["--machines", "0"]] {
        world.run(words.into_iter().chain(wrong)).code(2);
    }
}
