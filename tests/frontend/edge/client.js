// A client of @grpc/grpc-js: `node client.js ADDRESS PROTOS [CA]` reads an order from its standard input and
// prints what it saw of each call. Both are JSON; SIGINT cancels all calls.

const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');
const fs = require('fs');

const [address, protos, ca] = process.argv.slice(2);
const order = JSON.parse(fs.readFileSync(0));
const definition = loader.loadSync('unbroken/v1/inference_service.proto', {
  includeDirs: [protos],
  keepCase: true,
});
const { InferenceService } = grpc.loadPackageDefinition(definition).unbroken.v1;
const credentials = ca
  ? grpc.credentials.createSsl(fs.readFileSync(ca))
  : grpc.credentials.createInsecure();
const { identity, gzip } = grpc.compressionAlgorithms;
const client = new InferenceService(address, credentials, {
  'grpc.default_compression_algorithm': order.is_gzip ? gzip : identity,
});

function options() {
  return order.timeout_s ? { deadline: Date.now() + 1000 * order.timeout_s } : {};
}

function models() {
  return new Promise((resolve) => {
    client.ListModels({}, options(), (error, answer) => resolve(
      error ? { code: error.code } : { code: 0, models: answer.models.map((one) => one.model) },
    ));
  });
}

function generate() {
  return new Promise((resolve) => {
    const seen = { code: 0, ids: [], is_finished: false };
    const call = client.Generate(order.request, options());
    process.on('SIGINT', () => call.cancel());
    call.on('data', (message) => {
      seen.ids.push(...(message.token_ids || []));
      seen.is_finished = seen.is_finished || message.finished != null;
    });
    call.on('error', () => {}); // Its code comes with the status.
    call.on('status', (status) => {
      const metadata = Object.keys(status.metadata.getMap());
      resolve({ ...seen, code: status.code, has_details: metadata.includes('grpc-status-details-bin') });
    });
  });
}

async function main() {
  process.setMaxListeners(0);
  const call = order.request ? generate : models;
  const seen = await Promise.all(Array.from({ length: order.count }, call));
  process.stdout.write(JSON.stringify(seen));
  client.close();
}

main();
