// Tasks: those that xen-api makes and watches, and those of asynchronous calls.
import { rejection, run } from './client.mjs'

await run(async (xapi, { sr }) => {
  const record = {
    name_label: 'asynchronous',
    name_description: '',
    SR: sr,
    virtual_size: 2 * 1024 * 1024,
    type: 'user',
    sharable: false,
    read_only: false,
    other_config: {},
  }
  const vdi = await xapi.callAsync('VDI.create', record)
  const created = await xapi.barrier(vdi)
  const label = await xapi.callAsync('VDI.get_name_label', vdi).catch(error => error.code)
  const scanned = await xapi.callAsync('SR.scan', sr)
  const destroyed = await xapi.callAsync('VDI.destroy', vdi)
  const failed = await xapi.callAsync('VDI.destroy', vdi).then(
    () => null,
    ({ code, params, task }) => ({ code, params, status: task.status, error_info: task.error_info })
  )

  const own = await xapi.createTask('own task', 'of the test')
  const watched = xapi.watchTask(own)
  // A whole number is a string in xen-api's XML-RPC.
  await xapi.call('task.set_progress', own, 0)
  await xapi.call('task.set_progress', own, 0.5)
  const half = await xapi.getField('task', own, 'progress')
  // Events of progress are rare, but the last one isn't lost.
  while ((await xapi.barrier(own)).progress !== 0.5);
  await xapi.call('task.add_to_other_config', own, 'key', 'value')
  await xapi.call('task_set_status', own, 'success')
  const result = await watched

  const cancelled = await xapi.createTask('cancelled task')
  const cancellation = rejection(xapi.watchTask(cancelled))
  await xapi.call('task.cancel', cancelled)
  await cancellation

  // What xen-api has watched to its end, it destroys.
  while (xapi.getObjectByRef(own, null) !== null || xapi.getObjectByRef(cancelled, null) !== null) {
    await xapi.barrier()
  }
  const left = Object.values(xapi.objects.all).filter(({ $type }) => $type === 'task').length

  return {
    vdi,
    created: created.name_label,
    label,
    scanned,
    destroyed,
    failed,
    half,
    result,
    cancellation: await cancellation,
    left,
  }
})
