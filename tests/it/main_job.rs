//! The main job: what is submitted is built, tested and published.

use serde_json::json;

use crate::support::{image_of, tags_of, world};

#[tokio::test]
async fn a_build_is_built_tested_and_published_and_the_registry_serves_the_digest_of_the_status() {
    let world = world();
    let repository = world.repository("RUN echo built > /built");
    let mut job = world.job(&repository);
    job["image_tags"] = json!(["one", "two"]);
    job["test_commands"] = json!(["test \"$(cat /built)\" = built"]);
    let (_, status) = world.api().run(&job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    let digest = status["image"]["digest"].as_str().unwrap();
    // Two tags, one digest, and nothing else in the repository.
    for tag in ["one", "two"] {
        assert_eq!(world.served(image_of(&job), tag).await.as_deref(), Some(digest));
    }
    let mut tags = tags_of(&world.registry, image_of(&job)).await;
    tags.sort();
    assert_eq!(tags, ["one", "two"]);
    assert_eq!(status["git"]["commit"], repository.git(&["rev-parse", "HEAD"]));
    assert_eq!(status["git"]["ref"], "refs/heads/main");
}
