// A client of @grpc/grpc-js: `node client.js ADDRESS PROTOS [CA]` prints what it saw as JSON.

const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');
const fs = require('fs');

const [address, protos, ca] = process.argv.slice(2);
const definition = loader.loadSync('unbroken/v1/inference_service.proto', {
  includeDirs: [protos],
  keepCase: true,
});
const { InferenceService } = grpc.loadPackageDefinition(definition).unbroken.v1;
const credentials = ca
  ? grpc.credentials.createSsl(fs.readFileSync(ca))
  : grpc.credentials.createInsecure();
const client = new InferenceService(address, credentials);
const prompt = { token_ids: { ids: [...Buffer.from('once upon a time')] } };

function generate(params, { options = {}, cancelAfter = Infinity } = {}) {
  return new Promise((resolve) => {
    const seen = { ids: [], finished: false, code: 0 };
    const call = client.Generate({ ...prompt, params }, options);
    call.on('data', (message) => {
      seen.ids.push(...(message.token_ids || []));
      seen.finished = seen.finished || message.finished != null;
      if (seen.ids.length >= cancelAfter) call.cancel();
    });
    call.on('error', (error) => { seen.code = error.code; });
    call.on('status', (status) => {
      seen.code = status.code;
      seen.metadata = Object.keys(status.metadata.getMap());
      resolve(seen);
    });
  });
}

async function main() {
  const ten = { stopping: { max_tokens: 10 }, sampling: { temperature: 0 } };
  const seen = {};
  seen.models = await new Promise((resolve, reject) => client.ListModels({}, (error, answer) => (
    error ? reject(error) : resolve(answer.models.map((model) => model.model)))));
  seen.stream = await generate(ten);
  seen.many = await Promise.all(Array.from({ length: 100 }, () => generate(ten)));
  seen.cancelled = await generate({}, { cancelAfter: 5 });
  seen.late = await generate({}, { options: { deadline: Date.now() + 300 } });
  seen.invalid = await generate({ sampling: { temperature: -1 } });
  process.stdout.write(JSON.stringify(seen));
  client.close();
}

main();
