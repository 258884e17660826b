//! What a registry serves, read by plain HTTP.

use serde_json::Value;

const ACCEPTED: &str =
    "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json";

fn client() -> reqwest::Client {
    reqwest::Client::builder().tls_certs_only([]).build().unwrap()
}

/// The digest under a tag; none where there is none.
pub(super) async fn digest_of(registry: &str, image: &str, tag: &str) -> Option<String> {
    let url = format!("http://{registry}/v2/{image}/manifests/{tag}");
    let response = client().get(url).header("Accept", ACCEPTED).send().await.unwrap();
    if response.status() == reqwest::StatusCode::NOT_FOUND {
        return None;
    }
    assert!(response.status().is_success(), "{image}:{tag}: {}", response.status());
    Some(response.headers()["docker-content-digest"].to_str().unwrap().to_owned())
}

/// The label of the image under a tag; none where there is no such image.
pub(super) async fn label_of(registry: &str, image: &str, tag: &str, label: &str) -> Option<String> {
    let url = format!("http://{registry}/v2/{image}");
    let asked =
        client().get(format!("{url}/manifests/{tag}")).header("Accept", ACCEPTED).send().await.unwrap();
    let manifest: Value = asked.error_for_status().ok()?.json().await.unwrap();
    let config = format!("{url}/blobs/{}", manifest["config"]["digest"].as_str().unwrap());
    let config: Value = client().get(config).send().await.unwrap().json().await.unwrap();
    config["config"]["Labels"][label].as_str().map(str::to_owned)
}

/// Every tag of a repository.
pub(crate) async fn tags_of(registry: &str, image: &str) -> Vec<String> {
    let answer = client().get(format!("http://{registry}/v2/{image}/tags/list")).send().await.unwrap();
    let list: Value = answer.json().await.unwrap();
    let tags = list["tags"].as_array().cloned().unwrap_or_default();
    tags.iter().map(|tag| tag.as_str().unwrap().to_owned()).collect()
}
