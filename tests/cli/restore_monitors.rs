//! `restore` into a Firecracker or a Cloud Hypervisor that waits: a thread of the test that answers as their APIs do.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread::JoinHandle;

use serde_json::{Value, json};

use crate::restore::{PAGES, Restoring};
use crate::support::{World, can_mount_or_skip};

/// Takes as many requests as there are answers, and gives the paths and bodies.
fn api(path: &Path, answers: &'static [&'static str]) -> JoinHandle<Vec<(String, Value)>> {
    let listener = UnixListener::bind(path).unwrap();
    let path = path.to_owned();
    std::thread::spawn(move || {
        let mut requests = Vec::new();
        for answer in answers {
            let (mut socket, _) = listener.accept().unwrap();
            let mut text = String::new();
            let mut buffer = [0; 4096];
            let (head, body) = loop {
                let len = socket.read(&mut buffer).unwrap();
                assert!(len > 0, "it broke off: {text}");
                text += std::str::from_utf8(&buffer[..len]).unwrap();
                let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
                let len = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).unwrap();
                if body.len() >= len.parse().unwrap() {
                    break (head, body);
                }
            };
            let mut words = head.split(' ');
            assert_eq!(words.next(), Some("PUT"));
            let body = if body.is_empty() { Value::Null } else { serde_json::from_str(body).unwrap() };
            // What is named must be there while the monitor reads it.
            if let Some(directory) = body["source_url"].as_str().and_then(|url| url.strip_prefix("file://")) {
                let config = std::fs::read(Path::new(directory).join("config.json")).unwrap();
                requests.push(("config".to_owned(), serde_json::from_slice(&config).unwrap()));
                assert_eq!(std::fs::read(Path::new(directory).join("state.json")).unwrap(), b"{}");
            }
            requests.push((words.next().unwrap().to_owned(), body));
            socket.write_all(answer.as_bytes()).unwrap();
        }
        std::fs::remove_file(path).unwrap();
        requests
    })
}

const DONE: &str = "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";

#[test]
fn firecracker_is_told_what_to_load() {
    if !can_mount_or_skip("firecracker_is_told_what_to_load") {
        return;
    }
    let world = World::new();
    let restoring = Restoring::new(&world);
    let socket = world.path("api");
    let base = ["restore", "web1", "--vmm", "firecracker"];
    let words = |more: &[&str]| base.iter().chain(more).map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let sock = ["--api-sock", socket.to_str().unwrap()];
    world.run(words(&[&sock[..], &["--clone", "web2"]].concat())).code(5).says("start the monitor");
    assert_eq!(world.run(["log", "web2"]).code, 5);

    let thread = api(&socket, &[DONE]);
    let ran = world.ok(words(&[&sock[..], &["--json", "--hydrate"]].concat()));
    let requests = thread.join().unwrap();
    let epoch = restoring.path(&format!("web1/epochs/{}", restoring.epoch));
    assert_eq!(requests[0].0, "/snapshot/load");
    let expected = json!({
        "snapshot_path": format!("{epoch}/vmstate"),
        "mem_backend": {"backend_type": "File", "backend_path": format!("{epoch}/memory")},
        "track_dirty_pages": false,
        "resume_vm": true,
    });
    assert_eq!(requests[0].1, expected);
    ran.says("first instruction after").says("responsive after").says("fully resident after");
    assert!(ran.json()["resident_ms"].is_f64() && ran.json()["vmm"] == "firecracker", "{ran:?}");

    // By a server of page faults, paused, into a clone.
    let thread = api(&socket, &[DONE]);
    let more = ["--uffd", "/run/uffd", "--paused", "--clone", "web3", "--json"];
    let ran = world.ok(words(&[&sock[..], &more].concat()));
    let (_, body) = thread.join().unwrap().remove(0);
    assert_eq!(body["mem_backend"], json!({"backend_type": "Uffd", "backend_path": "/run/uffd"}));
    assert_eq!((&body["track_dirty_pages"], &body["resume_vm"]), (&json!(true), &json!(false)));
    assert!(ran.json()["first_instruction_ms"].is_null() && ran.json()["loaded_ms"].is_f64());
    assert_eq!(world.epochs("web3").len(), 1);

    // Refused: the clone is removed again.
    let refusal = "HTTP/1.1 400 \r\nContent-Length: 44\r\n\r\n{\"fault_message\":\"Load snapshot error: CPU.\"}";
    let refusal: &'static str = Box::leak(
        refusal.replace("44", &"{\"fault_message\":\"Load snapshot error: CPU.\"}".len().to_string()).into_boxed_str(),
    );
    let thread = api(&socket, Box::leak(Box::new([refusal])));
    world.run(words(&[&sock[..], &["--clone", "web2"]].concat())).code(1).says("(400): Load snapshot error: CPU.");
    thread.join().unwrap();
    assert_eq!(world.run(["log", "web2"]).code, 5);

    // Printed: with a socket too, and without one the clone is made for whoever sends the request.
    let printed = world.ok(words(&["--print", "--clone", "web2"])).stdout;
    assert!(printed.starts_with("PUT /snapshot/load {") && printed.contains("\"track_dirty_pages\":true"), "{printed}");
    assert_eq!(world.run(["log", "web2"]).code, 5);
    let printed = world.json(words(&["--clone", "web4"]));
    assert_eq!(printed["requests"][0]["path"], "/snapshot/load");
    assert_eq!(world.epochs("web4").len(), 1);
    restoring.check_clean();
}

#[test]
fn cloud_hypervisor_is_given_a_snapshot_that_points_to_the_epoch() {
    if !can_mount_or_skip("cloud_hypervisor_is_given_a_snapshot_that_points_to_the_epoch") {
        return;
    }
    let world = World::new();
    let restoring = Restoring::new(&world);
    std::fs::create_dir_all(restoring.path("ch1/live/snapshot")).ok();
    std::fs::create_dir(restoring.path("ch1")).ok();
    std::fs::create_dir_all(restoring.path("ch1/live/snapshot")).unwrap();
    let mem0 = restoring.path("ch1/live/mem0");
    std::fs::write(&mem0, crate::support::pages(5, PAGES)).unwrap();
    let config = json!({
        "cpus": {"boot_vcpus": 1},
        "memory": {"size": 0, "zones": [{"id": "mem0", "size": PAGES * 4096, "file": mem0, "shared": true}]},
    });
    std::fs::write(restoring.path("ch1/live/snapshot/config.json"), config.to_string()).unwrap();
    std::fs::write(restoring.path("ch1/live/snapshot/state.json"), b"{}").unwrap();
    world.ok(["commit", "ch1", "--tag", "running"]);
    let socket = world.path("api");
    let base = ["restore", "ch1@running", "--vmm", "cloud-hypervisor"];
    let words = |more: &[&str]| base.iter().chain(more).map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let sock = ["--api-sock", socket.to_str().unwrap()];
    let epoch = restoring.path(&format!("ch1/epochs/{}", world.epochs("ch1")[0]));

    let thread = api(&socket, &[DONE, DONE]);
    let ran = world.ok(words(&[&sock[..], &["--json"]].concat()));
    let requests = thread.join().unwrap();
    let zone = &requests[0].1["memory"]["zones"][0];
    assert_eq!((&zone["file"], &zone["shared"]), (&json!(format!("{epoch}/mem0")), &json!(false)));
    assert_eq!((requests[1].0.as_str(), requests[2].0.as_str()), ("/api/v1/vm.restore", "/api/v1/vm.resume"));
    let directory = requests[1].1["source_url"].as_str().unwrap().strip_prefix("file://").unwrap().to_owned();
    assert!(!Path::new(&directory).exists(), "{directory} is left behind");
    assert!(ran.json()["loaded_ms"].as_f64() <= ran.json()["first_instruction_ms"].as_f64());

    let thread = api(&socket, &[DONE]);
    world.ok(words(&[&sock[..], &["--clone", "ch2", "--paused", "--hydrate"]].concat())).says("fully resident after");
    let requests = thread.join().unwrap();
    let zone = &requests[0].1["memory"]["zones"][0];
    assert_eq!((&zone["file"], &zone["shared"]), (&json!(restoring.path("ch2/live/mem0")), &json!(true)));

    let thread = api(&socket, &["HTTP/1.1 500 \r\nContent-Length: 19\r\n\r\n[\"Error\",\"no zone\"]"]);
    world.run(words(&[&sock[..], &["--clone", "ch3"]].concat())).code(1).says("(500): Error: no zone");
    thread.join().unwrap();
    assert_eq!(world.run(["log", "ch3"]).code, 5);

    // Written for somebody else.
    world.run(words(&[])).code(2).says("--directory");
    let target = world.path("prepared").into_os_string().into_string().unwrap();
    let printed = world.ok(words(&["--directory", &target])).stdout;
    assert!(printed.contains(&format!("file://{target}")), "{printed}");
    assert!(Path::new(&target).join("config.json").exists());
    world.run(words(&["--directory", &target])).code(1).says("cannot write the snapshot");
    let printed = world.ok(words(&["--print", "--clone", "ch3"])).stdout;
    assert!(printed.contains("config.json {") && world.run(["log", "ch3"]).code == 5, "{printed}");
    restoring.check_clean();
}
